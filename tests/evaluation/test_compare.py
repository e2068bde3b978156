"""Comparisons find what is there and no more; tables keep apart what is not comparable."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from microlm.errors import UserError
from microlm.evaluation.results import metrics
from microlm.evaluation.results.metrics import compare, compare_task
from microlm.evaluation.results.statistics import holm, mcnemar_exact
from microlm.evaluation.results.store import Result, model_slug, write_result
from microlm.report.evaluation_table import Figure, comparison_text, evaluation_text, worth_showing
from microlm.report.text_table import WIDTH
from tests.support.toy_results import absent, toy_result

DRAWS = 400


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 200)


def folders(tmp_path: Path, *results: Result) -> list[Path]:
    for result in results:
        write_result(tmp_path, result)
    return [tmp_path / name for name in dict.fromkeys(model_slug(r.identity.model) for r in results)]


@pytest.mark.parametrize("task", ["hellaswag", "cola", "mrpc", "stsb", "cb"])
def test_a_model_does_not_differ_from_itself(task: str) -> None:
    result = toy_result(task)
    row = compare_task([result], [result], DRAWS)
    assert row["p"] == 1
    for entry in row["metrics"].values():
        assert (entry["difference"], entry["low"], entry["high"], entry["p"], entry["detectable"]) == (0, 0, 0, 1, None)


@pytest.mark.parametrize("task", ["hellaswag", "cola", "mrpc", "stsb", "cb"])
def test_the_better_model_is_found_whichever_side_it_is_on(task: str) -> None:
    good, poor = toy_result(task, "good", n=200, skill=5.0), toy_result(task, "poor", n=200, seed=1)
    row, back = compare_task([good], [poor], DRAWS), compare_task([poor], [good], DRAWS)
    for metric, entry in row["metrics"].items():
        assert entry["difference"] == pytest.approx(good.metrics[metric] - poor.metrics[metric], abs=2e-6)
        assert entry["low"] > 0 if metric != "gold_bpb" else entry["high"] < 0
        mirrored = back["metrics"][metric]
        assert (mirrored["low"], mirrored["high"]) == pytest.approx((-entry["high"], -entry["low"]), abs=2e-6)
        assert mirrored["detectable"] == pytest.approx(entry["detectable"], abs=2e-6)
    assert row["p"] == pytest.approx(2 / (DRAWS + 1), abs=1e-6)


def test_accuracies_are_judged_by_mcnemar_where_few_questions_differ() -> None:
    a = toy_result("rte", "a", n=100)
    flipped = a.table["correct_sum"].to_numpy(bool) & (np.cumsum(a.table["correct_sum"]) <= 4)
    worse = a.table.assign(
        correct_sum=a.table["correct_sum"] & ~flipped,
        prediction_sum=np.where(flipped, 1 - a.table["prediction_sum"], a.table["prediction_sum"]),
    )
    row = compare_task([a], [dataclasses.replace(a, table=worse)], DRAWS)
    assert row["discordance"] == 0.04
    assert row["mcnemar_p"] == mcnemar_exact(a.table["correct_sum"], worse["correct_sum"]) == 0.125
    assert row["metrics"]["acc"]["p"] < row["p"] == 0.125


def test_seeds_of_an_arm_are_judged_by_their_own_spread() -> None:
    a = [toy_result("sst2", "a", n=100, seed=s, skill=s) for s in (1, 4, 7)]
    b = [toy_result("sst2", "b", n=100, seed=10 + s, skill=0.5) for s in (1, 4, 7)]
    row = compare_task(a, b, DRAWS)
    entry = row["metrics"]["acc"]
    means = [np.mean([r.metrics["acc"] for r in side]) for side in (a, b)]
    assert (entry["a"], entry["b"]) == pytest.approx(means, abs=1e-6)
    assert entry["seeds"]["a"]["seed_sd"] == pytest.approx(np.std([r.metrics["acc"] for r in a], ddof=1), abs=1e-6)
    assert entry["seeds"]["a"]["seed_sd_beyond_items"] > entry["seeds"]["b"]["seed_sd_beyond_items"]
    assert row["p"] == max(entry["p"], entry["seeds"]["p"]) and "mcnemar_p" not in row
    assert entry["detectable"] > 2.8 * entry["se"]


def test_comparison_covers_what_both_have_and_names_the_rest(tmp_path: Path) -> None:
    shared = [toy_result(task, model, seed=len(model)) for task in ("sst2", "stsb") for model in ("good", "poor one")]
    rest = [
        toy_result("sst2", "good", shots=5),
        absent("snli", "poor one"),
        absent("qnli", "good"),
        toy_result("mrpc", "good"),
    ]
    found = compare(*folders(tmp_path, *shared, *rest, absent("qnli", "poor one")), draws=DRAWS)
    assert [row["task"] for row in found["tasks"]] == ["sst2", "stsb"]
    assert [row["p_holm"] for row in found["tasks"]] == pytest.approx(
        holm([row["p"] for row in found["tasks"]]), abs=1e-6
    )
    assert {(row["task"], row["shots"]): row["reason"] for row in found["left_out"]} == {
        ("qnli", 0): "data not available for good",
        ("mrpc", 0): "not scored for poor one",
        ("snli", 0): "not scored for good",
        ("sst2", 5): "not scored for poor one",
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = comparison_text(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "could have detected" in text and "Left out: mrpc" in text and "not of the recipes" in text
    assert "stsb (microlm, 0-shot)" in comparison_text(found)


def test_a_task_that_both_have_but_never_alike_is_refused(tmp_path: Path) -> None:
    both = folders(tmp_path, toy_result("sst2", "a"), toy_result("sst2", "b", limit=20))
    with pytest.raises(UserError, match="differ in number of questions: all against 20"):
        compare(*both, draws=DRAWS)


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a and b have no scored task in common"):
        compare(*folders(tmp_path, toy_result("sst2", "a"), toy_result("rte", "b")), draws=DRAWS)


def figure(**changed: object) -> Figure:
    known = {"model": "gpt2", "task": "hellaswag", "metric": "acc_norm", "value": 0.3114, "shots": 0}
    return Figure(**(known | {"protocol": "lm-eval", "source": "s", "checked": "second hand"} | changed))


def table_rows(markdown: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[2:]}


def test_the_table_keeps_protocols_and_published_figures_apart() -> None:
    mine = [toy_result("hellaswag", "a"), toy_result("hellaswag", "b", protocol="lm-eval"), toy_result("mrpc", "a")]
    mine += [absent("snli", "a"), toy_result("hellaswag", "b", shots=5, limit=20)]
    figures = [
        figure(),
        figure(value=0.312, checked="read at the source"),
        figure(shots=10, model="q"),
        figure(task="xnli_en"),
    ]
    rows = table_rows(evaluation_text(mine, figures, "markdown"))
    assert list(rows) == ["a", "b", "gpt2", "q", "(most frequent label)", "(always yes)", "(guessing)"]
    ours = "hellaswag<br>acc_norm<br>completion<br>0-shot"
    theirs = "hellaswag<br>acc_norm<br>published<br>lm-eval<br>0-shot"
    subset = "hellaswag<br>acc_norm<br>completion<br>5-shot<br>20 questions"
    acc = mine[0].metrics
    assert rows["a"][ours] == f"{100 * acc['acc_norm']:.2f} ± {100 * acc['acc_norm_se']:.2f}" and rows["b"][ours] == ""
    assert rows["gpt2"][theirs] == "31.14* / 31.20" and rows["a"][theirs] == rows["gpt2"][ours] == ""
    assert rows["b"][subset] and rows["a"][subset] == ""
    assert rows["a"]["snli<br>acc<br>question<br>0-shot"] == "data not available"
    mrpc = mine[2].metrics
    assert rows["(always yes)"]["mrpc<br>acc<br>lm-eval<br>0-shot"] == f"{100 * mrpc['always_positive']['acc']:.2f}"
    assert (
        rows["(always yes)"][ours] == rows["(most frequent label)"][ours] == "" and rows["(guessing)"][ours] == "25.00"
    )


def test_results_are_shown_beside_what_can_be_compared() -> None:
    results = [toy_result("hellaswag", "gpt2@607a30d"), toy_result("mrpc", "gpt2@607a30d")]
    figures = [figure(), figure(model="q"), figure(model="q", protocol="completion")]
    figures = worth_showing(figures, results)
    rows = table_rows(evaluation_text(results, figures, "markdown"))
    assert rows["gpt2@607a30d"]["hellaswag<br>acc_norm<br>published<br>lm-eval<br>0-shot"] == "31.14*"
    assert rows["q"]["hellaswag<br>acc_norm<br>published<br>completion<br>0-shot"] == "31.14*"
    assert "31.14*" in evaluation_text(results, figures) and len(rows["q"]) == 4


def test_every_metric_has_its_own_column_and_baseline_and_published_figures() -> None:
    rows = table_rows(evaluation_text([toy_result("mrpc", "a")], (), "markdown", every_metric=True))
    assert [heading.split("<br>")[1] for heading in rows["a"]] == ["acc", "f1"] and all(rows["(always yes)"].values())
    results = [toy_result(task, "a") for task in ("hellaswag", "stsb", "cola")]
    figures = worth_showing([figure(metric="acc", protocol="completion")], results)
    rows = table_rows(evaluation_text(results, figures, "markdown", True))
    assert [heading.split("<br>")[:3] for heading in rows["a"]] == [
        ["hellaswag", "acc_norm", "completion"],
        ["hellaswag", "acc", "completion"],
        ["hellaswag", "acc", "published"],
        ["cola", "mcc", "lm-eval"],
        ["cola", "acc", "lm-eval"],
        ["stsb", "pearson", "microlm"],
        ["stsb", "spearman", "microlm"],
    ]
    assert rows["gpt2"]["hellaswag<br>acc<br>published<br>completion<br>0-shot"] == "31.14*"


def test_what_was_truncated_or_is_not_the_whole_split_is_said_under_the_table() -> None:
    whole = toy_result("sst2", "a", n=20)
    short = toy_result("rte", "short", n=20, limit=10)
    short.metrics["truncated"], whole.metrics["truncated"] = 4, 0
    part = dataclasses.replace(whole, data={"source": "files", "file": "GLUE/dev.tsv", "rows": 20, "published": 872})
    text = " ".join(evaluation_text([part, short]).split())
    assert "rte (lm-eval, 0-shot, 10 questions): of 4 of 10 questions short did not read the start" in text
    assert "sst2: GLUE/dev.tsv has 20 questions with a label, the published validation split 872." in text
    said = evaluation_text([dataclasses.replace(whole, data={"rows": 872, "published": 872})], (), "markdown")
    assert "did not read the start" not in said and "questions with a label" not in said


def test_a_task_without_data_is_named_once() -> None:
    nothing = dataclasses.replace(absent("snli"), unavailable="snli: the hub is not allowed; connect")
    assert "\nsnli: data not available: the hub is not allowed; connect\n" in evaluation_text([nothing])


def test_a_wide_table_stays_within_the_terminal() -> None:
    tasks = ("hellaswag", "sst2", "mrpc", "rte", "cb", "qnli", "stsb")
    results = [toy_result(task, model, seed=len(model)) for task in tasks for model in ("student", "a/long-model-name")]
    text = evaluation_text([*results, absent("snli")], [figure()])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("a/long-model-name") > 1
    assert "cb: 3-way stand-in for SNLI" in text and "snli: data not available: not packaged" in text


def test_a_column_of_two_wordings_or_of_one_model_twice_is_refused() -> None:
    a, b = toy_result("rte", "a"), toy_result("rte", "b", questions_sha256="r" * 64)
    with pytest.raises(UserError, match="wording"):
        evaluation_text([a, b])
    with pytest.raises(UserError, match="a has two results of rte"):
        evaluation_text([a, a])
