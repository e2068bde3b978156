"""Rows of earlier code are taken for done only where a sample of them came out the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from microlm.errors import UserError
from microlm.research.study.driver import Progress, Study, differences
from microlm.research.study.grid import GRID, read_grid, read_yaml
from microlm.research.study.repository import CLONE, prepare
from microlm.research.study.results import read_results
from tests.support.clones import ROOT, Clone

PARAMS = read_yaml(ROOT / "params.yaml")
PRUNED = read_grid("pruned", "study", PARAMS, ROOT / GRID)


def test_accepted_rows_are_done_and_keep_every_other_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clone(tmp_path)
    study = Study(tmp_path, PRUNED, PARAMS)
    before = study.csv.read_text()
    study.csv.write_text(re.sub(r",[0-9a-f]{12},[0-9a-f]{12},", ",older,older,", before))
    assert study.stale() == study.tasks == study.remaining()
    monkeypatch.setattr(Study, "_run_locked", lambda study: None)  # the sample came out as it was
    assert study.accept(1).endswith(f"{len(study.tasks)} runs are taken for done")
    assert study.stale() == []
    blank = [re.sub(r",[0-9a-f]{12},[0-9a-f]{12},", ",,", text) for text in (before, study.csv.read_text())]
    assert blank[0] == blank[1]


def test_a_folder_that_the_queue_cannot_take_is_named_before_anything_is_made(tmp_path: Path) -> None:
    root = tmp_path / "Schüler"
    root.mkdir()
    Clone(root)
    with pytest.raises(UserError, match="Schüler: DVC's queue fails below a folder whose name is not ASCII"):
        prepare(root, "study")
    assert not (root / CLONE).exists()


def test_only_a_loss_that_moved_is_a_difference() -> None:
    row = read_results(ROOT / PRUNED.results)[0]
    assert differences([row], [row | {"student_acc_norm": 0.9, "student_elapsed_s": 1.0}]) == []
    (told,) = differences([row], [row | {"student_nats": 1.5}])
    assert told == f"{row['run']}: student_nats {row['student_nats']} -> 1.5"


@pytest.mark.parametrize("moved_by_code", [False, True])
def test_where_the_machine_is_another_the_code_that_recorded_runs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved_by_code: bool
) -> None:
    """A loss that is not the recorded one is the machine's doing where the recording commit gives it too."""
    clone = Clone(tmp_path)
    study = Study(tmp_path, PRUNED, PARAMS)
    before = re.sub(r",[0-9a-f]{12},[0-9a-f]{12},", ",older,older,", study.csv.read_text())
    study.csv.write_text(before)
    clone.commit("rows of another machine")
    recorded, commits = {row["run"]: row for row in read_results(study.csv)}, []

    def run(self: Study, waiting: list, jobs: int, commit: str, keep: Callable[[list], None]) -> list[str]:
        commits.append(commit)
        nats = 1.5 if commit == "HEAD" or not moved_by_code else 1.25
        for task in waiting:
            keep([recorded[point.slug] | {"student_nats": nats} for point in task.runs])
        return []

    monkeypatch.setattr(Study, "run", run)
    recording = clone.git("rev-parse", "HEAD").strip()
    if moved_by_code:
        with pytest.raises(UserError, match=rf"student_nats 1.25 -> 1.5.* code of {recording[:7]} .*make study"):
            study.accept(1)
        assert study.csv.read_text() == before
    else:
        assert f"what the code of {recording[:7]} gives here" in study.accept(1)
        assert study.stale() == []
    assert commits == ["HEAD", recording]


@pytest.mark.parametrize("own", [False, True])
def test_only_a_commit_of_the_rows_own_code_speaks_for_them(tmp_path: Path, own: bool) -> None:
    """Rows may be committed together with a later edit of the code, and that code says nothing of them."""
    Clone(tmp_path)
    study = Study(tmp_path, PRUNED, PARAMS)
    study.progress, study.commit = Progress(study.tasks[:1]), "0123456789"
    code = study.code if own else "older"
    study.csv.write_text(re.sub(r"(,[0-9a-f]{12},)[0-9a-f]{12},", rf"\g<1>{code},", study.csv.read_text()))
    if own:
        study.refuse_other_code(tmp_path)
    else:
        with pytest.raises(UserError, match=r"0123456, has other code than its rows.*make study"):
            study.refuse_other_code(tmp_path)


def test_rows_that_are_there_do_not_let_two_runs_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may have made them: shards and caches that all runs share need not be in this one's cache."""
    Clone(tmp_path)
    study = Study(tmp_path, PRUNED, PARAMS)
    study.csv.write_text(re.sub(r",[0-9a-f]{12},[0-9a-f]{12},", ",older,older,", study.csv.read_text()))
    begun: list[Progress] = []
    monkeypatch.setattr(Study, "_run_locked", lambda study: begun.append(study.progress))
    study.accept(2)
    assert len(begun[0].waiting) == 2
    first = begun[0].next_task()
    begun[0].waiting.remove(first)
    begun[0].flying[first.name] = first
    assert begun[0].waiting and begun[0].next_task() is None
