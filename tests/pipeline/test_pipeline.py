"""The whole pipeline through real DVC, at scale smoke, in a clone of the working tree.

`make smoke` and `make soak` run it under GPT-2's tokenizer, as params.yaml has it, and every command and stage in an
interpreter of its own; `make test` under a tokenizer of bytes, in forks of one (support/forked_python.py): what DVC
promises is the same, and most of the time would go into a vocabulary of 50,257 and importing torch.
"""

import contextlib
import fnmatch
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from microlm.config import load_config
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import UserError
from microlm.files import sha256_file
from microlm.models.model_files import WEIGHTS, load_student
from microlm.report.model_card import card_of
from microlm.runtime.paths import CARD
from tests.support.clones import Clone
from tests.support.forked_python import forked_python
from tests.support.soak import SOAKING
from tests.support.tiny_run import TEACHER, WHEELS, tiny_parameters, write_teacher_of_bytes
from tests.support.tiny_teacher import write_tiny_teacher

CONTEXT = 512  # for all of HellaSwag, byte by byte
TRAINED_MODELS = ("control", "continued", "student")
STAGES = {
    "check", "fetch", "tokenize", "outside", "start", "pretrain", "teacher", "select", "distill", "continue", "compare",
    "evaluate@control", "evaluate@continued", "evaluate@student", "evaluate@teacher",
}  # fmt: skip
AFTER_ALPHA = {"check", "distill", "evaluate@student", "compare"}
TEXT = "A plant is a living thing; 1984 was a year.\n\n  Ünïcode — too."


def fingerprint(clone: Clone, *folders: str) -> dict[str, str]:
    """sha256 of every file below the folders that DVC keeps: it passes over the models' cards."""
    found = (path for folder in folders for path in (clone.directory / folder).rglob("*") if path.is_file())
    files = (path for path in found if path.name != CARD)
    return {str(path.relative_to(clone.directory)): sha256_file(path) for path in files}


def read(clone: Clone, path: str) -> Any:
    return json.loads((clone.directory / path).read_text())


def ran(output: str) -> list[str]:
    """Stages whose command DVC ran."""
    return re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    """A clone after its first `dvc repro` at scale smoke, committed, and what that printed."""
    python = Path(sys.executable) if SOAKING else forked_python()
    return ran_once(Clone(tmp_path_factory.mktemp("clone"), python))


def ran_once(clone: Clone) -> tuple[Clone, str]:
    (clone.directory / "dvc.lock").unlink(missing_ok=True)
    params = clone.directory / "params.yaml"
    if SOAKING:
        params.write_text(re.sub(r"(?m)^scale: \S+", "scale: smoke", params.read_text()))
        write_tiny_teacher(clone.directory / TEACHER, wheels=WHEELS)
    else:
        params.write_text(tiny_parameters().replace("context: 128", f"context: {CONTEXT}"))
        write_teacher_of_bytes(clone.directory / TEACHER, CONTEXT)
    # shared, so that the wheels are downloaded once, whoever asks first
    WHEELS.mkdir(parents=True, exist_ok=True)
    (clone.directory / ".resume").mkdir()
    (clone.directory / ".resume" / "wheels").symlink_to(WHEELS)
    clone.commit("scale smoke")
    printed = clone.dvc("repro")
    clone.commit("the run")
    return clone, printed


@pytest.fixture
def clone(finished: tuple[Clone, str]) -> Clone:
    """The finished clone as it was committed, whatever the test before did to it."""
    clone, _ = finished
    clone.git("reset", "--hard", "--quiet")
    clone.dvc("checkout", "--force")
    clone.git("status")  # refreshes Git's index: an edit within the same second could be missed otherwise
    return clone


@dataclass(frozen=True)
class Changed:
    """A clone at another alpha: the old one, what DVC printed, and the models and their scores before and after."""

    clone: Clone
    alpha: float
    printed: str
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module")
def changed(finished: tuple[Clone, str], tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """A copy of the finished clone after an experiment. Who goes on from there takes a copy."""
    clone = finished[0].copied(tmp_path_factory.mktemp("changed") / "clone")
    clone.git("reset", "--hard", "--quiet")
    clone.dvc("checkout", "--force")
    alpha = load_config(clone.directory / "params.yaml").alpha
    clone.dvc("exp", "run", "-S", f"alpha={alpha}")  # DVC writes params.yaml in its own layout from here on
    before = fingerprint(clone, "models", "data/evaluation")
    printed = clone.dvc("exp", "run", "-S", "alpha=0.2")
    return Changed(clone, alpha, printed, before, fingerprint(clone, "models", "data/evaluation"))


def test_fresh_clone_runs_to_the_report(finished: tuple[Clone, str]) -> None:
    clone, printed = finished
    assert set(ran(printed)) == STAGES
    for path in (
        "summary",
        *TRAINED_MODELS,
        "teacher",
        "tokenize",
        "outside",
        "windows",
        *(f"evaluation/{name}" for name in (*TRAINED_MODELS, "teacher")),
    ):
        assert read(clone, f"metrics/{path}.json")
    for name in (*TRAINED_MODELS, "teacher"):
        written = read(clone, f"data/evaluation/{name}/samples.json")["samples"]
        assert len(written) == 8 and all(sample["tokens"] or sample["ended"] for sample in written)
    for name in TRAINED_MODELS:
        weights = sha256_file(clone.directory / "models" / name / "model.safetensors")
        assert read(clone, f"metrics/evaluation/{name}.json")["weights_sha256"] == weights
    for path in ("plots/hellaswag.png", "plots/loss.png"):
        assert (clone.directory / path).read_bytes().startswith(b"\x89PNG")
    assert (clone.directory / "plots/report.html").read_text().rstrip().endswith("</html>")
    for name in TRAINED_MODELS:
        assert (clone.directory / "plots" / "loss" / f"{name}.csv").read_text().startswith("step,")
        labels = {line.split()[1] for line in (clone.directory / "metrics" / f"{name}.log").read_text().splitlines()}
        assert labels == {"train", "val", "hella", "ood_bpb"}


def test_run_leaves_data_and_models_out_of_git(finished: tuple[Clone, str]) -> None:
    clone, _ = finished
    assert clone.git("status", "--porcelain") == ""
    kept = set(clone.git("ls-files", "data", "models", "metrics").split())
    assert not any(path.startswith(("data/", "models/")) and not path.endswith(".gitignore") for path in kept)
    assert not any(path.endswith(".log") for path in kept)
    assert not any(path.suffix in (".tmp", ".old") for path in clone.directory.glob("[!.]*/**/.*"))


def test_second_repro_does_nothing(clone: Clone) -> None:
    printed = clone.dvc("repro")
    assert ran(printed) == []
    assert "Data and pipelines are up to date." in printed
    assert clone.git("status", "--porcelain") == ""


def test_new_alpha_runs_four_stages_and_the_old_one_comes_from_the_run_cache(changed: Changed, tmp_path: Path) -> None:
    clone, before, after = changed.clone.copied(tmp_path / "clone"), changed.before, changed.after
    assert set(ran(changed.printed)) == AFTER_ALPHA
    others = {path.split("/")[-2] for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert others == {"student"}

    difference = clone.dvc_json("metrics", "diff", "--json")
    assert set(difference) == {"metrics/student.json", "metrics/evaluation/student.json", "metrics/summary.json"}
    assert {"val_bpb", "ood_bpb"} <= set(difference["metrics/student.json"])

    printed = clone.dvc("exp", "run", "-S", f"alpha={changed.alpha}")
    assert set(ran(printed)) <= {"check", "compare"}
    assert fingerprint(clone, "models", "data/evaluation") == before


def test_a_card_beside_weights_makes_nothing_stale_and_is_never_of_others(changed: Changed, tmp_path: Path) -> None:
    clone = changed.clone.copied(tmp_path / "clone")
    cards = {name: clone.directory / "models" / name / CARD for name in TRAINED_MODELS}
    clone.dvc("config", "--local", "core.remote", "kept")
    clone.dvc("remote", "add", "--local", "kept", str(tmp_path / "remote"))
    assert all(card_of(card.parent) for card in cards.values()) and "alpha 0.2" in cards["student"].read_text()
    for command in (["push", "evaluate@student"], ["gc", "--workspace", "--force"], ["checkout"], ["pull", "distill"]):
        clone.dvc(*command, "--quiet")
        assert all(card.is_file() for card in cards.values()) and not fnmatch.filter(listed(clone), f"*{CARD}")
        assert "up to date" in clone.dvc("status", "--with-deps", "compare")
    clone.dvc("exp", "save", "--name", "at-02")
    clone.dvc("exp", "run", "-S", f"alpha={changed.alpha}")
    clone.dvc("exp", "apply", "at-02")  # brings the models of 0.2 and no card
    for card in cards.values():
        with contextlib.suppress(UserError):  # of weights that are gone
            assert card_of(card.parent) is None or str(sha256_file(card.parent / WEIGHTS)) in card.read_text()
    clone.run(clone.python, "-m", "stages.compare", "--cards")
    assert all(card_of(card.parent) for card in cards.values()) and "alpha 0.2" in cards["student"].read_text()
    assert "up to date" in clone.dvc("status", "--with-deps", "compare") and "note:" not in told_of_cards(clone)
    cards["student"].write_text(
        cards["student"].read_text().replace(sha256_file(cards["student"].parent / WEIGHTS), "0")
    )
    assert "models/student/README.md: is of other weights" in told_of_cards(clone)


def listed(clone: Clone) -> list[str]:
    return clone.dvc("ls", "--dvc-only", "--recursive", ".", "models").split()


def told_of_cards(clone: Clone) -> str:
    return clone.run(clone.python, "-m", "stages.compare", "--show").stderr


def test_live_teacher_leaves_no_cache_and_one_graph(clone: Clone) -> None:
    printed = clone.dvc("exp", "run", "-S", "scales.smoke.teacher.source=live")
    assert {"teacher", "distill", "compare"} <= set(ran(printed))
    assert not {"tokenize", "pretrain", "continue", "evaluate@control", "evaluate@continued"} & set(ran(printed))
    assert {path.name for path in (clone.directory / "data/teacher").iterdir()} == {"manifest.json", "table.bin"}
    assert read(clone, "metrics/summary.json")["teacher"]["source"] == "live"
    assert ran(clone.dvc("repro")) == []


def test_page_is_in_git_and_the_same_again_and_no_plot_of_dvc(clone: Clone) -> None:
    before = sha256_file(clone.directory / "plots/report.html")
    assert "plots/report.html" in clone.git("ls-files", "plots").split()
    assert ran(clone.dvc("repro", "--force", "--single-item", "compare")) == ["compare"]
    assert sha256_file(clone.directory / "plots/report.html") == before
    assert clone.git("status", "--porcelain") == ""
    assert "failed" not in clone.dvc("plots", "show").lower()
    assert "report.html" not in (clone.directory / "dvc_plots/index.html").read_text()


def test_plots_draw_without_outside_text(clone: Clone) -> None:
    """Its column is blank then, as a training without `evaluation.outside` leaves it."""
    for curve in (clone.directory / "plots" / "loss").iterdir():
        head, *rows = curve.read_text().splitlines()
        assert head.endswith(",ood_bpb")
        curve.write_text("\n".join([head, *(row[: row.rindex(",") + 1] for row in rows)]) + "\n")
    assert "failed" not in clone.dvc("plots", "show").lower()


def test_plots_diff_draws_without_a_network(changed: Changed) -> None:
    clone = changed.clone
    printed = clone.dvc("plots", "diff")
    assert "failed" not in printed
    page = (clone.directory / "dvc_plots" / "index.html").read_text()
    assert re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page) == []
    assert "window.vegaEmbed" in page
    for name, column in (("HellaSwag", "acc_norm"), ("Loss", "log10_val"), ("Outside", "ood_bpb")):
        spec = clone.dvc_json("plots", "diff", "--targets", name, "--show-vega")
        points = spec["data"]["values"]
        assert {point["filename"].removesuffix(".csv") for point in points} == set(TRAINED_MODELS)
        assert {point["rev"] for point in points} == {"HEAD", "workspace"}
        assert all(point[column] not in ("", None) for point in points)
    steps = {name: [int(p["step"]) for p in points if p["filename"] == f"{name}.csv"] for name in TRAINED_MODELS}
    assert min(steps["student"]) == min(steps["continued"]) >= max(steps["control"])


def test_bad_alpha_is_refused_in_one_line_and_the_student_stays(clone: Clone) -> None:
    before = fingerprint(clone, "models", "data/evaluation", "metrics", "plots")
    printed = clone.dvc("exp", "run", "-S", "alpha=high", status=255)
    complaints = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    assert complaints[0].startswith("error: params.yaml: alpha: 'high'")
    assert "Traceback" not in printed
    assert ran(printed) == ["check"]
    assert fingerprint(clone, "models", "data/evaluation", "metrics", "plots") == before


@pytest.mark.parametrize("name", TRAINED_MODELS)
def test_model_is_a_hugging_face_directory(finished: tuple[Clone, str], name: str) -> None:
    clone, _ = finished
    directory = clone.directory / "models" / name
    assert not [path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = load_tokenizer(directory).encode(TEXT)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == TEXT

    ours = load_student(directory).eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = theirs(tokens).logits[..., : ours.n_vocab]
        assert torch.allclose(ours.logits(ours.hidden(tokens)), expected, atol=1e-4)
        generated = theirs.generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > tokens.shape[1]


def test_arms_saw_the_same_tokens(finished: tuple[Clone, str]) -> None:
    clone, _ = finished
    continued, student = (read(clone, f"metrics/{name}.json") for name in ("continued", "student"))
    assert (continued["steps"], continued["tokens"]) == (student["steps"], student["tokens"])
    assert read(clone, "metrics/control.json")["parameters"] == continued["parameters"] == student["parameters"]
