"""The report says what its intervals allow, refuses what cannot be compared, and draws the same bytes again."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.results.metrics import task_metrics
from microlm.evaluation.results.statistics import clustered_error, mean
from microlm.evaluation.results.store import Identity, Result, write_result
from microlm.evaluation.tasks.task import TASKS
from microlm.report.curve_figures import draw_figures
from microlm.report.offline_page import PAGE as OFFLINE
from microlm.report.summary import COMPARISONS, benchmark_rows, centred_mean_rows, read_scores, summarize
from microlm.report.summary_table import amount, report_text, sentences
from microlm.report.text_table import WIDTH
from microlm.runtime.paths import TRAINED_MODELS
from stages import compare
from tests.support.clones import ROOT

QUESTIONS, WINDOWS = 240, 120
STUDENT_GAIN = 0.05  # nats a byte that the student is better than continued in the made-up scores


def _write_scores(top: Path) -> None:
    """What stage `evaluate` would leave for four models: window by window the student is better by STUDENT_GAIN."""
    random = np.random.default_rng(0)
    label, source = random.integers(0, 4, QUESTIONS), np.arange(QUESTIONS) // 2
    gold_bytes, window_bytes = random.integers(20, 200, QUESTIONS), random.integers(800, 1200, WINDOWS)
    shared = random.normal(1.6, 0.1, WINDOWS)
    for name, shift in zip(SCORED_MODELS, (0.2, 0.0, -STUDENT_GAIN, -0.6), strict=True):
        folder = top / "data/evaluation" / name
        folder.mkdir(parents=True)
        correct = random.random(QUESTIONS) < (0.42 if name == "teacher" else 0.26)
        items = {"item": [str(3 * i) for i in range(QUESTIONS)], "cluster": source.astype(str), "label": label}
        items |= {f"bytes_{k}": gold_bytes + k for k in range(4)} | {f"nats_{k}": 1.0 * gold_bytes for k in range(4)}
        items |= {"correct_token": correct, "correct_sum": correct, "gold_bytes": gold_bytes, "near_tie": False}
        items |= {"gold_nats": gold_bytes * (2 + shift), "margin": 0.0, "prediction_sum": np.where(correct, label, -1)}
        nats = window_bytes * (shared + shift + random.normal(0, 0.02, WINDOWS))
        asked = Identity(name, name, "words", "hellaswag", "completion", 0, QUESTIONS, "data", "questions")
        table = pd.DataFrame(items)
        figures = task_metrics(TASKS["hellaswag"], "completion", 0, table) | {"truncated": 7 * (name == "control")}
        write_result(folder.parent, Result(asked, figures, table))
        write_result(folder.parent, Result(replace(asked, task="snli", protocol="question"), unavailable="no network"))
        windows = pd.DataFrame({"split": "val", "window": np.arange(WINDOWS), "nats": nats, "bytes": window_bytes})
        windows.to_parquet(folder / "windows.parquet")
        error = clustered_error(mean(correct), source)
        hellaswag = {"acc_norm": correct.mean(), "acc_norm_se": error, "acc": 0.25, "acc_se": 0.03, "gold_bpb": 3.0}
        metrics = {"model": name, "parameters": 134_515_008 if name == "teacher" else 17_500_000}
        metrics |= {"tasks": {"hellaswag": {"completion": {"0-shot": hellaswag}}}}
        metrics |= {"validation": {"bpb": nats.sum() / window_bytes.sum() / math.log(2)}}
        _write_json(top / f"metrics/evaluation/{name}.json", metrics)
        _write_json(
            top / f"metrics/{name}.json",
            {
                "source": "cache",
                "tokens": 307_200 if name == "teacher" else 1_998_848,
                "tokens_before": 0 if name == "control" else 1_998_848,
                "steps": 976,
                "epochs": 1.5,
            },
        )


def _write_models(top: Path) -> None:
    """What the cards are made from, beside the scores: the weights are no more than their hash."""
    for name in TRAINED_MODELS:
        config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "hidden_size": 128}
        _write_json(top / f"models/{name}/config.json", config | {"max_position_embeddings": 1024})
        (top / f"models/{name}/SHA256SUMS").write_text(f"{name}  model.safetensors\n")
    _write_json(top / "metrics/start.json", {"start": "fresh"})
    counts = {split: {"documents": 90, "tokens": 80_000} for split in ("train", "val")}
    _write_json(top / "metrics/tokenize.json", counts)
    _write_json(top / "data/shards/manifest.json", {"source": {"source": "packaged"}})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, default=float))


def _write_curves(top: Path) -> None:
    for kind in ("hellaswag", "loss"):
        (top / "plots" / kind).mkdir(parents=True)
    for k, name in enumerate(TRAINED_MODELS):
        steps = np.arange(0, 500, 50) + (0 if name == "control" else 450)
        loss = 10 * np.exp(-steps / 200) + 5 - 0.1 * k
        curve = {"step": steps, "train_loss": loss, "val_loss": loss, "log10_train": np.log10(loss)}
        pd.DataFrame(curve | {"log10_val": np.log10(loss), "val_bpb": loss / 3}).to_csv(
            top / f"plots/loss/{name}.csv", index=False
        )
        accuracy = 0.25 + 0.01 * np.sin(steps + k)
        curve = {"step": steps, "acc_norm": accuracy, "acc": accuracy, "gold_bpb": loss / 3}
        pd.DataFrame(curve).to_csv(top / f"plots/hellaswag/{name}.csv", index=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it stands when stage `compare` starts."""
    _write_scores(tmp_path)
    _write_curves(tmp_path)
    _write_models(tmp_path)
    params = ROOT / "params.yaml"
    (tmp_path / "params.yaml").write_text(params.read_text())
    (tmp_path / OFFLINE).parent.mkdir(parents=True)
    shutil.copy(ROOT / OFFLINE, tmp_path / OFFLINE)  # vega, for the page
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare"])
    return tmp_path


def _without_mean(draws: int = 1000) -> dict:
    return summarize({"alpha": 0.5, "objective": "rkl"}, draws, seed=1)


def _summary(draws: int = 1000) -> dict:
    summary = _without_mean(draws)
    order = [("hellaswag", None, 0), ("snli", None, 0)]
    summary["centred_mean_tasks"], rows = centred_mean_rows(SCORED_MODELS, COMPARISONS, order, draws, 1)
    return {key: value | rows.get(key, {}) if key in rows else value for key, value in summary.items()}


def _items_of(name: str) -> Path:
    return Path("data/evaluation") / name / f"hellaswag.completion.0shot.{QUESTIONS}questions.parquet"


def test_summary_holds_the_differences_and_says_which_arm_is_better(project: Path) -> None:
    summary = _summary()
    difference = summary["student_minus_continued"]
    assert difference["val_bpb"] == pytest.approx(-STUDENT_GAIN / math.log(2), abs=0.006)
    assert difference["val_bpb"] == pytest.approx(
        summary["student"]["val_bpb"] - summary["continued"]["val_bpb"], abs=2e-6
    )
    assert difference["val_bpb_low"] < difference["val_bpb"] < difference["val_bpb_high"] < 0
    assert summary["verdict"]["val_bpb"] == "distillation better than continuation"
    assert "distillation beat plain continuation" in sentences(summary)[0]
    assert summary["teacher"]["labelling_to_distilling_flops"] == pytest.approx(
        (2 * 134_515_008 * 307_200) / (6 * 17_500_000 * 1_998_848), abs=1e-6
    )


def test_equal_models_are_not_told_apart(project: Path) -> None:
    for name in ("continued", "student"):
        for table in (_items_of("control").name, "windows.parquet"):
            path = Path("data/evaluation") / name / table
            path.write_bytes(Path(f"data/evaluation/control/{table}").read_bytes())
    summary = _without_mean()
    for pair in ("student_minus_continued", "student_minus_control"):
        values = {key: value for key, value in summary[pair].items() if key != "acc_norm_mcnemar_p"}
        assert set(values.values()) == {0} and summary[pair]["acc_norm_mcnemar_p"] == 1
    assert set(summary["verdict"].values()) == {"no difference shown"}
    assert "do not tell distillation from plain continuation" in sentences(summary)[0]


def test_report_fits_the_terminal_and_speaks_of_chance_seed_and_cost(project: Path) -> None:
    text = report_text(_summary() | {"benchmarks": benchmark_rows(SCORED_MODELS, 200, 1)})
    assert max(map(len, text.splitlines())) <= WIDTH <= 100
    for phrase in ("135M", "2.00M + 2.00M", "0.2955", "Not shown to beat guessing"):
        assert phrase in text
    assert "One seed" in text and "The teacher labelled 307k tokens" in text
    assert "HellaSwag: 240 questions" in text and "centred mean" in text
    assert "averaged over 1 task: hellaswag (completion, 0-shot)" in " ".join(text.split())
    assert "hellaswag acc_norm, completion, 0-shot, 240" in text and "Data not available: snli." in text
    cut = "hellaswag acc_norm, completion, 0-shot, 240 without their start, longer than the context: 7 (control)."
    assert f"Questions of {cut}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.26, "guessing (0.25) on HellaSwag: control,"), (0.40, "is above chance")]
)
def test_nearness_to_chance_is_said_only_where_it_holds(project: Path, accuracy: float, said: str) -> None:
    summary = _summary()
    for name in TRAINED_MODELS:
        summary[name] |= {"acc_norm": accuracy, "acc_norm_se": 0.02}
    assert said in " ".join(sentences(summary))


@pytest.mark.parametrize("change", [{"item": "7"}, {"label": 5}, {"bytes_0": 1}])
def test_other_questions_are_not_compared(project: Path, change: dict[str, int | str]) -> None:
    items = pd.read_parquet(_items_of("student"))
    for column, value in change.items():
        items.loc[3, column] = value
    items.to_parquet(_items_of("student"))
    with pytest.raises(UserError, match=r"student and .* cannot be compared; .* evaluate@student"):
        read_scores()


def test_fewer_questions_are_not_compared(project: Path) -> None:
    pd.read_parquet(_items_of("teacher")).iloc[:-1].to_parquet(_items_of("teacher"))
    with pytest.raises(UserError, match="cannot be compared"):
        read_scores()


def test_absent_and_damaged_scores_are_named_with_their_stage(project: Path) -> None:
    _items_of("continued").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"continued/hellaswag\..*t is damaged .*repro -f -s evaluate@continued"):
        read_scores()
    _items_of("continued").unlink()
    with pytest.raises(UserError, match=r"data/evaluation/continued: 0 results .*dvc repro -f -s evaluate@continued"):
        read_scores()


def test_stage_writes_the_summary_and_prints_it_again_without_data(project: Path, monkeypatch, capsys) -> None:
    compare.main()
    printed = capsys.readouterr().out
    for path in (project / "data").rglob("*.parquet"):
        path.unlink()
    monkeypatch.setattr("sys.argv", ["compare", "--show"])
    compare.main()
    assert capsys.readouterr().out == printed
    Path("metrics/summary.json").write_text('{"control": {}}')
    with pytest.raises(UserError, match=r"summary\.json lacks .*dvc repro -f -s compare"):
        compare.main()


def test_figures_are_the_same_bytes_again(project: Path) -> None:
    items = dict.fromkeys(TRAINED_MODELS, 200)
    first = [path.read_bytes() for path in draw_figures(items)]
    assert [path.read_bytes() for path in draw_figures(items)] == first
    assert all(b"Software" not in png and b"date" not in png for png in first)
    for name in ("hellaswag", "loss"):
        height, width, _ = imread(f"plots/{name}.png").shape
        assert height > 600 and width > 1000


def test_an_absent_or_blank_curve_is_named_with_its_stage_and_no_figure_changes(project: Path) -> None:
    before = [path.read_bytes() for path in draw_figures(dict.fromkeys(TRAINED_MODELS, 200))]
    path = Path("plots/loss/continued.csv")
    path.write_text("step,log10_train,log10_val\n0,1.0,\n")
    with pytest.raises(UserError, match=r"loss/continued\.csv has a blank cell.*continue"):
        draw_figures(dict.fromkeys(TRAINED_MODELS, 200))
    path.unlink()
    with pytest.raises(UserError, match=r"loss/continued\.csv is not there; make it with: dvc repro continue"):
        draw_figures(dict.fromkeys(TRAINED_MODELS, 200))
    assert [Path(f"plots/{name}.png").read_bytes() for name in ("hellaswag", "loss")] == before


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (999.6, "1.00k"), (12_345, "12.3k"), (17_500_000, "17.5M"), (999_999_999, "1.00B")],
)
def test_amounts_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert amount(number) == text
