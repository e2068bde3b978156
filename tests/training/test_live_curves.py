"""TensorBoard shows what the CSV files say, also of a training that was killed; nobody else needs its package."""

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.config import ConfigError, config_of
from microlm.errors import UserError
from microlm.files import read_yaml
from microlm.training import live_curves
from microlm.training.history import Evaluation, History
from microlm.training.live_curves import EVENTS, RUNS, event_files, refuse_absent
from tests.support.clones import ROOT
from tests.support.tiny_run import PRETRAIN, changed, contents, finish, remove_outputs, said_so_far, start

CURVES = ("loss", "hellaswag")


def accumulated(folder: Path):
    """The scalars of a folder as TensorBoard itself reads them: tag -> [(step, value), ...]."""
    reason = "tensorboard is not installed: pip install -c constraints.txt -e '.[tensorboard]'"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def as_written(top: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What the run's CSV files and log hold, by the same tags."""
    found = {}
    for curve in CURVES:
        table = pd.read_csv(top / "plots" / curve / f"{name}.csv")
        for column in table.columns[1:].difference(table.columns[table.isna().all()]):
            found[f"{curve}/{column}"] = list(zip(table["step"], table[column], strict=True))
    lines = [line.split() for line in (top / "metrics" / f"{name}.log").read_text().splitlines()]
    return found | {"step/train_loss": [(int(s), float(value)) for s, label, value in lines if label == "train"]}


def assert_the_same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag  # each once, in order
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], abs=1e-6), tag


def history(steps: Sequence[int]) -> History:
    made = History()
    for step in steps:
        if step % 4 == 0:
            made.add_evaluation(step, Evaluation(3.0, 2.0 + step, 1.0, {"acc_norm": 0.25, "acc": 0.5}, None))
        made.add_step(step + 1, 3.0 - step / 100)
    return made


def written_by(top: Path, made: History) -> dict[str, list[tuple[int, float]]]:
    made.write("toy", top / "plots", top / "metrics")
    return as_written(top, "toy")


@settings(max_examples=15)
@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_history_that_is_taken_up_again_is_there_once(steps: int, lost: int, shown: int) -> None:
    """A process shows more than its last checkpoint holds and dies; the next one begins with that checkpoint."""
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        for last in (min(shown, steps), steps):
            with event_files(top / "events", 100, ["a line"]) as show:
                for end in range(max(0, last - lost), last + 1):
                    show(history(range(100, 100 + end)))
        whole = history(range(100, 100 + steps))
        assert_the_same(accumulated(top / "events"), written_by(top, whole))
        assert len(list((top / "events").glob(EVENTS))) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_training_that_is_stopped_and_resumed_shows_what_its_csv_files_say(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    top = changed(whole, tmp_path / "run", log="[csv, tensorboard]")
    remove_outputs(PRETRAIN, top)
    process = start(PRETRAIN, top)
    while process.poll() is None and not any(file.stat().st_size > 1500 for file in top.glob(f"{RUNS}/*/*/{EVENTS}")):
        time.sleep(0.002)
    process.send_signal(number)
    process.wait()
    finish(PRETRAIN, top)
    (folder,) = (top / RUNS / "control").iterdir()
    assert f"tensorboard --logdir {RUNS}" in said_so_far(top)
    assert_the_same(accumulated(folder), as_written(top, "control"))
    assert contents(top, PRETRAIN.outputs) == contents(whole, PRETRAIN.outputs)  # and nothing else is different
    remove_outputs(PRETRAIN, top)
    finish(PRETRAIN, top)  # once more from the start: the same run, not a second curve
    assert_the_same(accumulated(folder), as_written(top, "control"))


def test_without_its_package_tensorboard_is_refused_at_the_door(whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(live_curves.importlib.util, "find_spec", lambda name: None)
    refuse_absent(["csv"])
    with pytest.raises(
        UserError, match=r"params\.yaml: log: tensorboard .*pip install .*\[tensorboard\].*log: \[csv\]"
    ):
        refuse_absent(["csv", "tensorboard"])


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (["tensorboard"], r"log: lacks csv, .*write \[csv\] or \[csv, tensorboard\]"),
        (["csv", "csv"], "log: each may be named once"),
        (["csv", "wandb"], "log: .* is not a list of csv, tensorboard"),
        ("csv", "log: 'csv' is not a list of csv, tensorboard"),
        ([], "log: .* is not a list of csv, tensorboard"),
    ],
)
def test_the_csv_files_are_always_written(params: dict, log: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(params | {"log": log}, "params.yaml")


def test_where_curves_are_shown_makes_no_stage_stale() -> None:
    stages = read_yaml(ROOT / "dvc.yaml", "", "")["stages"].values()
    listed = {key for stage in stages for key in stage.get("do", stage).get("params", ())}
    assert "alpha" in listed and "log" not in listed


@pytest.fixture(scope="module")
def params() -> dict:
    return read_yaml(ROOT / "params.yaml", "", "")
