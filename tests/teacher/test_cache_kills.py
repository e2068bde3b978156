"""What a stopped capture leaves: killed at any moment and run again, it ends with the bytes of one never killed."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.files import atomic_directory, recover_directory, remove_directory, sha256_bytes
from microlm.pipeline.capture import CACHE, METRICS, capture_teacher, publish
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import MANIFEST
from tests.support.forked_python import Forked
from tests.support.tiny_run import copied_to, finished
from tests.support.toy import toy_shards
from tests.support.toy_cache import content
from tests.support.workspace import RUNTIME, config_of, inside

pytestmark = pytest.mark.usefixtures("several_blocks")
USUAL_BLOCK = cache_module.SMALLEST_BLOCK


class Killed(BaseException):
    """The process is dead: nothing after this reaches the disk."""


class Mortal:
    """Dies at the `last`-th call that touches the disk, before it has any effect; the dead do not tidy up."""

    CALLS = ("replace", "fsync", "unlink", "link", "mkdir", "rmdir")

    def __init__(self, last: int) -> None:
        self.lived, self.last = 0, last

    def step(self, *_: object) -> None:
        if self.lived >= self.last:
            raise Killed
        self.lived += 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.CALLS:
                patch.setattr(os, name, self.guarded(getattr(os, name)))
            yield

    def guarded(self, call: Callable[..., object]) -> Callable[..., object]:
        def mortal(*arguments: object, **options: object) -> object:
            self.step()
            return call(*arguments, **options)

        return mortal


def lives(run: Callable[[Mortal], object]) -> int:
    """How many steps `run` takes when nothing kills it."""
    immortal = Mortal(sys.maxsize)
    with immortal():
        run(immortal)
    return immortal.lived


def killed_after(run: Callable[[Mortal], object], steps: int) -> None:
    mortal = Mortal(steps)
    with mortal(), pytest.raises(Killed):
        run(mortal)


def test_a_capture_killed_at_any_step_and_resumed_writes_the_same_bytes(toy, tmp_path):
    def run_in(directory: Path) -> Callable[[Mortal], object]:
        directory.mkdir()
        return lambda mortal: toy.capture(directory, mortal.step)

    expected = {name: sha256 for name, sha256 in content(toy.whole).items() if name != MANIFEST}
    steps = lives(run_in(tmp_path / "counted"))
    assert steps > 5 * len(expected)
    for last in range(steps):
        directory = tmp_path / str(last)
        killed_after(run_in(directory), last)
        found = {name: sha256 for name, sha256 in content(directory).items() if not name.endswith(".tmp")}
        assert found.items() <= expected.items()  # whole blocks or none
        toy.capture(directory)
        assert content(directory) == expected  # and nothing torn is left lying about
        shutil.rmtree(directory)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_a_capture_killed_again_and_again_ends_with_the_same_bytes(toy, tmp_path_factory, lasts):
    directory = tmp_path_factory.mktemp("again")
    for last in lasts:
        mortal = Mortal(last)
        with mortal():
            try:
                toy.capture(directory, mortal.step)
            except Killed:
                continue
    toy.capture(directory)
    assert content(directory).items() == {k: v for k, v in content(toy.whole).items() if k != MANIFEST}.items()
    assert toy.manifest(directory) == json.loads((toy.whole / MANIFEST).read_text())


def test_a_capture_killed_by_the_kernel_at_random_moments_writes_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    toy_shards(corpus, 50257, tokens=1000)
    process = Forked(["tests.support.killed_captures", str(corpus), str(tmp_path)], tmp_path, os.environ)
    said, complained = process.communicate()
    assert process.returncode == 0, complained
    assert int(said) > 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole") == content(tmp_path / "warm") != {}


def test_a_publication_killed_at_any_step_keeps_the_blocks_and_the_old_cache(toy, tmp_path):
    manifest = json.loads((toy.whole / MANIFEST).read_text())
    blocks = {name: sha256 for name, sha256 in content(toy.whole).items() if name != MANIFEST}

    def prepare(top: Path) -> None:
        (top / "scratch").mkdir(parents=True)
        for name in blocks:
            shutil.copy(toy.whole / name, top / "scratch" / name)
        (top / CACHE).mkdir(parents=True)
        (top / CACHE / "old").write_text("old")

    prepare(tmp_path / "counted")
    with inside(tmp_path / "counted"):
        steps = lives(lambda _: publish(Path("scratch"), manifest))
    assert steps > len(blocks)
    for last in range(steps):
        top = tmp_path / str(last)
        prepare(top)
        with inside(top):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)  # the one that comes after it is another process
                killed_after(lambda _: publish(Path("scratch"), manifest), last)
            assert content(Path("scratch")) == blocks
            # the old cache, the new one, or for the instant between two renames none
            assert content(CACHE) in (content(toy.whole), {"old": sha256_bytes(b"old")}, {})
            publish(Path("scratch"), manifest)
            assert content(CACHE) == content(toy.whole)


DEAD = 2**22 + 1  # no process has so high a number


def test_a_folder_whose_replacement_or_removal_is_killed_at_any_step_is_whole_or_gone(tmp_path):
    def prepare(top: Path) -> Path:
        folder = top / "state"
        folder.mkdir(parents=True)
        for name in ("weights", "progress"):
            (folder / name).write_text("old")
        return folder

    def replace(folder: Path) -> None:
        with atomic_directory(folder) as fresh:
            for name in ("weights", "progress"):
                (fresh / name).write_text("new")

    for change, may_be_gone in ((replace, False), (remove_directory, True)):
        counted = prepare(tmp_path / change.__name__)
        steps = lives(lambda _, change=change, folder=counted: change(folder))
        assert steps > 2
        for last in range(steps):
            folder = prepare(tmp_path / f"{change.__name__}-{last}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: DEAD)
                killed_after(lambda _, change=change, folder=folder: change(folder), last)
            if not may_be_gone:
                recover_directory(folder)
            found = [path.read_text() for path in folder.glob("*")]
            assert found in (["old"] * 2, ["new"] * 2) or (may_be_gone and not folder.exists())
            replace(folder)
            assert [path.name for path in folder.parent.iterdir()] == ["state"]  # nothing is left lying about


def test_blocks_are_copied_where_they_cannot_be_linked(toy, tmp_path, monkeypatch):
    def unlinkable(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", unlinkable)
    with inside(tmp_path):
        publish(toy.whole, json.loads((toy.whole / MANIFEST).read_text()))
        assert content(CACHE) == content(toy.whole)
        assert not (CACHE / "block-00000.bin").samefile(toy.whole / "block-00000.bin")


@pytest.fixture
def workspace(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of stage `teacher`, with blocks of the usual size."""
    monkeypatch.setattr(cache_module, "SMALLEST_BLOCK", USUAL_BLOCK)
    return copied_to(finished(), tmp_path / "workspace")


def test_a_stage_stopped_after_the_capture_does_not_ask_the_teacher_again(workspace, monkeypatch):
    config, first = config_of(workspace), content(workspace / CACHE)
    rename = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target) == METRICS / "teacher.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        rename(source, target)

    with inside(workspace):
        assert json.loads((METRICS / "teacher.json").read_text())["tokens_per_s"] > 0
        shutil.rmtree(CACHE)  # as DVC does before it runs the stage
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                capture_teacher(config, RUNTIME)
        shutil.rmtree(CACHE)
        capture_teacher(config, RUNTIME)
        assert content(CACHE) == first
        assert json.loads((METRICS / "teacher.json").read_text())["tokens_per_s"] == 0  # none was asked for
        assert not list(Path(".resume").glob("teacher-*"))
