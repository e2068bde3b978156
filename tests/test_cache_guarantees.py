"""What the teacher's cache promises: it is whose it says, whole, and the same bytes however often it was killed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import cached_windows, evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import sha256_bytes, sha256_file, write_json
from microlm.model import ModelShape, StudentLM
from microlm.pipeline.labels import CACHE, METRICS, label, publish
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of, sealed
from microlm.teacher.capture import capture
from tests.clones import ROOT
from tests.tiny_teacher import write_tiny_teacher
from tests.toy import toy_shards
from tests.workspace import RUNTIME, WHEELS, config_of, inside, make_workspace

N_VOCAB, SEQ_LEN, WINDOWS = 70, 16, 20
RUN = {"weights_sha256": "weights", "dtype": "torch.float32"}
USUAL_BLOCK = cache_module.SMALLEST_BLOCK
NOT_IDENTITY = {"blocks", "sha256", "table_sha256"}
FIELDS = ["format", "version", *(field.name for field in fields(CacheIdentity))]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of three windows, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SMALLEST_BLOCK", 3 * SEQ_LEN * 5 * 8)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=900)


@pytest.fixture(scope="module")
def model() -> StudentLM:
    shape = ModelShape(
        N_VOCAB, 128, layers=1, hidden_size=16, heads=1, head_dim=16, intermediate_size=16, context=32, rope_theta=1e4
    )
    return StudentLM(shape, seed=5).eval()


@pytest.fixture(scope="module")
def identity(shards: TokenShards) -> CacheIdentity:
    return CacheIdentity("toy", None, "tokenizer", N_VOCAB, shards.digest, SEQ_LEN, WINDOWS, 5, (1.0, 2.0), **RUN)


def captured(
    model: StudentLM,
    shards: TokenShards,
    identity: CacheIdentity,
    directory: Path,
    progress: Callable[[int], object] = lambda tokens: None,
) -> int:
    windows = evenly_spaced(50, WINDOWS)
    return capture(model, shards, windows, identity, directory, batch_rows=2, compiled=False, progress=progress)


def content(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.glob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model, shards, identity, tmp_path_factory) -> Path:
    """A finished cache. Whoever damages it mends it."""
    directory = tmp_path_factory.mktemp("whole")
    captured(model, shards, identity, directory)
    write_json(directory / MANIFEST, manifest_of(identity, *RUN.values(), directory))
    assert len(list(identity.blocks())) > 4
    return directory


def read(directory: Path, identity: CacheIdentity) -> TeacherCache:
    return TeacherCache(directory, identity, evenly_spaced(50, WINDOWS))


def refused(directory: Path, identity: CacheIdentity, file: str) -> str:
    """The one line in which reading is refused, naming `file`."""
    with pytest.raises(UserError) as error:
        read(directory, identity)
    assert str(directory / file) in str(error.value) and "\n" not in str(error.value)
    assert "dvc repro" in str(error.value)
    return str(error.value)


@contextmanager
def damaged(path: Path, new: bytes | None) -> Iterator[None]:
    """`path` with other content, or away, for the body."""
    old = path.read_bytes()
    path.unlink()
    if new is not None:
        path.write_bytes(new)
    try:
        yield
    finally:
        path.write_bytes(old)


def test_every_field_of_the_manifest_is_held_against_the_reader(whole, identity):
    assert set(json.loads((whole / MANIFEST).read_text())) == {*FIELDS, *NOT_IDENTITY}


def another(value: Any) -> Any:
    if isinstance(value, list):
        return value[:-1]
    return value + 1 if isinstance(value, int) else f"{value}x"


@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_that_is_honest_about_another_field_is_refused_by_it(whole, identity, field):
    manifest = json.loads((whole / MANIFEST).read_text())
    honest = json.dumps(sealed({**manifest, field: another(manifest[field])}))
    with damaged(whole / MANIFEST, honest.encode()):
        assert field in refused(whole, identity, MANIFEST)
    read(whole, identity)


def test_a_reader_that_does_not_know_the_weights_does_not_ask_for_them(whole, identity):
    assert read(whole, replace(identity, weights_sha256=None, dtype=None)).manifest["weights_sha256"] == "weights"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused_by_the_file_it_is_in(whole, identity, data):
    path = data.draw(st.sampled_from(sorted(whole.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with damaged(path, bytes(content)):
        refused(whole, identity, path.name)


def test_every_byte_of_the_manifest_is_guarded(whole, identity):
    content = (whole / MANIFEST).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with damaged(whole / MANIFEST, bytes(flipped)):
            refused(whole, identity, MANIFEST)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_cut_short_or_grown_is_refused(whole, identity, data):
    path = data.draw(st.sampled_from(sorted(whole.iterdir())))
    content = path.read_bytes()
    grown = content + data.draw(st.binary(min_size=1, max_size=3).filter(lambda more: bool(more.strip())))
    cut = content[: data.draw(st.integers(0, len(content) - 2))]  # the manifest's last byte is a line's end
    with damaged(path, data.draw(st.sampled_from((grown, cut)))):
        refused(whole, identity, path.name)


def test_an_absent_file_is_refused(whole, identity):
    for path in sorted(whole.iterdir()):
        with damaged(path, None):
            assert "is not there" in refused(whole, identity, path.name)


def test_blocks_in_each_others_place_are_refused(whole, identity):
    first, second = whole / "block-00000.bin", whole / "block-00001.bin"
    with damaged(first, second.read_bytes()), damaged(second, first.read_bytes()):
        refused(whole, identity, first.name)


def test_a_manifest_that_lists_other_blocks_is_refused(whole, identity):
    manifest = json.loads((whole / MANIFEST).read_text())
    for blocks in (manifest["blocks"][1:], [{**block, "sha256": "0" * 64} for block in manifest["blocks"]]):
        with damaged(whole / MANIFEST, json.dumps(sealed({**manifest, "blocks": blocks})).encode()):
            refused(whole, identity, "block-00000.bin")


def test_a_temperature_that_was_not_captured_is_refused_in_one_line(whole, identity):
    cache = read(whole, identity)
    with pytest.raises(UserError, match=r"temperature: 2.5 is not in the teacher's cache, which holds 1, 2;") as error:
        cache.teacher(evenly_spaced(50, WINDOWS)[:1], 2.5)
    assert "\n" not in str(error.value) and "teacher.temperatures" in str(error.value)


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


def test_a_capture_killed_at_any_step_and_resumed_writes_the_same_bytes(model, shards, identity, whole, tmp_path):
    def run_in(directory: Path) -> Callable[[Mortal], object]:
        directory.mkdir()
        return lambda mortal: captured(model, shards, identity, directory, mortal.step)

    expected = {name: sha256 for name, sha256 in content(whole).items() if name != MANIFEST}
    steps = lives(run_in(tmp_path / "counted"))
    assert steps > 5 * len(expected)
    for last in range(steps):
        directory = tmp_path / str(last)
        killed_after(run_in(directory), last)
        found = {name: sha256 for name, sha256 in content(directory).items() if not name.endswith(".tmp")}
        assert found.items() <= expected.items()  # whole blocks or none
        captured(model, shards, identity, directory)
        assert content(directory) == expected  # and nothing torn is left lying about
        shutil.rmtree(directory)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_a_capture_killed_again_and_again_ends_with_the_same_bytes(
    model, shards, identity, whole, tmp_path_factory, lasts
):
    directory = tmp_path_factory.mktemp("again")
    for last in lasts:
        mortal = Mortal(last)
        with mortal():
            try:
                captured(model, shards, identity, directory, mortal.step)
            except Killed:
                continue
    captured(model, shards, identity, directory)
    assert content(directory).items() == {k: v for k, v in content(whole).items() if k != MANIFEST}.items()
    assert manifest_of(identity, *RUN.values(), directory) == json.loads((whole / MANIFEST).read_text())


KILLED_FOR_REAL = """
import os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from microlm.corpus.batches import cached_windows, evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.hub import HubLanguageModel
from microlm.teacher import cache
from microlm.teacher.capture import capture
from tests.tiny_teacher import tiny_llama

torch.set_num_threads(1)
corpus, top, n_vocab, cache.SMALLEST_BLOCK = Path(sys.argv[1]), Path(sys.argv[2]), 50257, 64 * 4 * 50
shards = TokenShards(corpus, "train")
model = HubLanguageModel(tiny_llama(SimpleNamespace(eot_id=0)), n_vocab)
identity = cache.CacheIdentity("tiny", None, "", n_vocab, shards.digest, 64, 12, 8, (1.0, 2.0))
assert len(list(identity.blocks())) == 3

def run(name):
    (top / name).mkdir(exist_ok=True)
    windows = evenly_spaced(14, 12)
    return capture(model, shards, windows, identity, top / name, 2, compiled=False, progress=lambda tokens: None)

run("warm")
began = time.perf_counter()
run("whole")
lasted = time.perf_counter() - began
killed = 0
for attempt in range(8):
    child = os.fork()
    if not child:
        run("killed")
        os._exit(0)
    time.sleep(random.Random(attempt).uniform(0, 0.7) * lasted)
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
run("killed")
print(killed)
"""


def test_a_capture_killed_by_the_kernel_at_random_moments_writes_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    toy_shards(corpus, 50257, tokens=1000)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_FOR_REAL, corpus, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole") == content(tmp_path / "warm") != {}


def test_a_publication_killed_at_any_step_keeps_the_blocks_and_the_old_cache(whole, identity, tmp_path):
    manifest = json.loads((whole / MANIFEST).read_text())
    blocks = {name: sha256 for name, sha256 in content(whole).items() if name != MANIFEST}

    def prepare(top: Path) -> None:
        (top / "scratch").mkdir(parents=True)
        for name in blocks:
            shutil.copy(whole / name, top / "scratch" / name)
        (top / CACHE).mkdir(parents=True)
        (top / CACHE / "old").write_text("old")

    prepare(tmp_path / "counted")
    with inside(tmp_path / "counted"):
        steps = lives(lambda _: publish(Path("scratch"), identity, manifest))
    assert steps > len(blocks)
    for last in range(steps):
        top = tmp_path / str(last)
        prepare(top)
        with inside(top):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)  # the one that comes after it is another process
                killed_after(lambda _: publish(Path("scratch"), identity, manifest), last)
            assert content(Path("scratch")) == blocks
            # the old cache, the new one, or for the instant between two renames none
            assert content(CACHE) in (content(whole), {"old": sha256_bytes(b"old")}, {})
            publish(Path("scratch"), identity, manifest)
            assert content(CACHE) == content(whole)


def test_blocks_are_copied_where_they_cannot_be_linked(whole, identity, tmp_path, monkeypatch):
    def unlinkable(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", unlinkable)
    with inside(tmp_path):
        publish(whole, identity, json.loads((whole / MANIFEST).read_text()))
        assert content(CACHE) == content(whole)
        assert not (CACHE / "block-00000.bin").samefile(whole / "block-00000.bin")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of stage `teacher`, with blocks of the usual size."""
    monkeypatch.setattr(cache_module, "SMALLEST_BLOCK", USUAL_BLOCK)
    return make_workspace(tmp_path / "workspace")


def test_a_stage_stopped_after_the_capture_does_not_ask_the_teacher_again(workspace, monkeypatch):
    config, first = config_of(workspace), content(workspace / CACHE)
    rename = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target) == METRICS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        rename(source, target)

    with inside(workspace):
        assert json.loads(METRICS.read_text())["tokens_per_s"] > 0
        shutil.rmtree(CACHE)  # as DVC does before it runs the stage
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                label(config, RUNTIME)
        shutil.rmtree(CACHE)
        label(config, RUNTIME)
        assert content(CACHE) == first
        assert json.loads(METRICS.read_text())["tokens_per_s"] == 0  # none was asked for
        assert not list(Path(".resume").glob("teacher-*"))


def test_a_reader_refuses_the_cache_of_weights_that_were_changed_in_place(workspace):
    config = config_of(workspace)
    with inside(workspace):
        shards = TokenShards(Path("data/shards"), "train")
        windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
        TeacherCache(CACHE, cache_module.cache_identity(config, shards), windows)
        write_tiny_teacher(Path(config.at.teacher.model), seed=1, wheels=WHEELS)
        with pytest.raises(UserError, match=r"manifest.json: weights_sha256 is .* but this run has"):
            TeacherCache(CACHE, cache_module.cache_identity(config, shards), windows)
        shutil.rmtree(config.at.teacher.model)  # where the weights are not at hand, the cache serves without them
        TeacherCache(CACHE, cache_module.cache_identity(config, shards), windows)


def test_the_records_of_a_capture_are_finite_or_refused(model, shards, identity, tmp_path):
    broken = StudentLM(model.shape, seed=5).eval()
    with torch.no_grad():
        broken.head_weight[3] = torch.nan
    with pytest.raises(UserError, match=r"logits are not finite in windows"):
        captured(broken, shards, identity, tmp_path)
    assert not list(tmp_path.iterdir())
