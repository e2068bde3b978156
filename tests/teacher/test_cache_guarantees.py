"""What a reader of the teacher's cache refuses: whatever is not wholly the cache that it expects."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import cached_windows, evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import sha256_file
from microlm.models.student import StudentLM
from microlm.runtime.paths import CACHE
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, sealed
from tests.support.toy_cache import WINDOWS, ToyCache
from tests.support.workspace import config_of, inside, make_workspace, write_own_teacher

pytestmark = pytest.mark.usefixtures("several_blocks")
USUAL_BLOCK = cache_module.SMALLEST_BLOCK
NOT_IDENTITY = {"blocks", "sha256", "table_sha256"}
# `teacher_tokenizer` is in the manifest where it is another than `tokenizer` (tests/teacher/test_partly_covered.py)
FIELDS = ["format", "version", *(f.name for f in fields(CacheIdentity) if f.name != "teacher_tokenizer")]


def refused(toy: ToyCache, file: str) -> str:
    """The one line in which reading is refused, naming `file`."""
    with pytest.raises(UserError) as error:
        toy.read()
    assert str(toy.whole / file) in str(error.value) and "\n" not in str(error.value)
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


def test_every_field_of_the_manifest_is_held_against_the_reader(toy):
    assert set(json.loads((toy.whole / MANIFEST).read_text())) == {*FIELDS, *NOT_IDENTITY}


def another(value: Any) -> Any:
    if isinstance(value, list):
        return value[:-1]
    return value + 1 if isinstance(value, int) else f"{value}x"


@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_that_is_honest_about_another_field_is_refused_by_it(toy, field):
    manifest = json.loads((toy.whole / MANIFEST).read_text())
    honest = json.dumps(sealed({**manifest, field: another(manifest[field])}))
    with damaged(toy.whole / MANIFEST, honest.encode()):
        assert field in refused(toy, MANIFEST)
    toy.read()


def test_a_reader_that_does_not_know_the_weights_does_not_ask_for_them(toy):
    assert toy.read(replace(toy.identity, weights_sha256=None, dtype=None)).manifest["weights_sha256"] == "weights"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused_by_the_file_it_is_in(toy, data):
    path = data.draw(st.sampled_from(sorted(toy.whole.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with damaged(path, bytes(content)):
        refused(toy, path.name)


def test_every_byte_of_the_manifest_is_guarded(toy):
    content = (toy.whole / MANIFEST).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with damaged(toy.whole / MANIFEST, bytes(flipped)):
            refused(toy, MANIFEST)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_cut_short_or_grown_is_refused(toy, data):
    path = data.draw(st.sampled_from(sorted(toy.whole.iterdir())))
    content = path.read_bytes()
    grown = content + data.draw(st.binary(min_size=1, max_size=3).filter(lambda more: bool(more.strip())))
    cut = content[: data.draw(st.integers(0, len(content) - 2))]  # the manifest's last byte is a line's end
    with damaged(path, data.draw(st.sampled_from((grown, cut)))):
        refused(toy, path.name)


def test_an_absent_file_is_refused(toy):
    for path in sorted(toy.whole.iterdir()):
        with damaged(path, None):
            assert "is not there" in refused(toy, path.name)


def test_a_large_cache_is_hashed_once_and_again_where_a_file_is_another(tmp_path, monkeypatch):
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    toy = ToyCache.make(tmp_path)
    monkeypatch.setattr(cache_module, "sha256_file", counted)
    monkeypatch.setattr(cache_module, "TRUSTED_BYTES", 1)
    monkeypatch.chdir(tmp_path)
    files = {path.name for path in toy.whole.iterdir()} - {MANIFEST}

    def newly_hashed() -> set[str]:
        hashed.clear()
        toy.read()
        return set(hashed)

    assert newly_hashed() == files and newly_hashed() == set()
    block = toy.whole / "block-00001.bin"
    whole = block.read_bytes()
    block.unlink()
    block.write_bytes(whole)  # the same bytes, another file
    assert newly_hashed() == {block.name} and newly_hashed() == set()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{block}: its sha256 is not the manifest's" in refused(toy, block.name)
    block.write_bytes(whole)
    (memo,) = tmp_path.glob(".resume/verified-*.json")
    memo.write_text("{")
    assert newly_hashed() == files
    monkeypatch.setattr(cache_module, "TRUSTED_BYTES", 2**32)
    assert newly_hashed() == files == newly_hashed()  # a small one is hashed at every start


def test_blocks_in_each_others_place_are_refused(toy):
    first, second = toy.whole / "block-00000.bin", toy.whole / "block-00001.bin"
    with damaged(first, second.read_bytes()), damaged(second, first.read_bytes()):
        refused(toy, first.name)


def test_a_manifest_that_lists_other_blocks_is_refused(toy):
    manifest = json.loads((toy.whole / MANIFEST).read_text())
    for blocks in (manifest["blocks"][1:], [{**block, "sha256": "0" * 64} for block in manifest["blocks"]]):
        with damaged(toy.whole / MANIFEST, json.dumps(sealed({**manifest, "blocks": blocks})).encode()):
            refused(toy, "block-00000.bin")


def test_a_temperature_that_was_not_captured_is_refused_in_one_line(toy):
    cache = toy.read()
    with pytest.raises(UserError, match=r"temperature: 2.5 is not in the teacher's cache, which holds 1, 2;") as error:
        cache.of_batch(read_batch(toy.shards, evenly_spaced(50, WINDOWS)[:1], toy.identity.seq_len), 2.5)
    assert "\n" not in str(error.value) and "teacher.temperatures" in str(error.value)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of stage `teacher`, with blocks of the usual size."""
    monkeypatch.setattr(cache_module, "SMALLEST_BLOCK", USUAL_BLOCK)
    return make_workspace(tmp_path / "workspace")


def test_a_reader_refuses_the_cache_of_weights_that_were_changed_in_place(workspace):
    config = config_of(workspace)
    with inside(workspace):
        shards = TokenShards(Path("data/shards"), "train")
        windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
        identity = partial(cache_module.cache_identity, config.at.teacher, config.at.batch.seq_len, shards)
        TeacherCache(CACHE, identity(), windows)
        write_own_teacher(Path(config.at.teacher.model), seed=1)
        with pytest.raises(UserError, match=r"manifest.json: weights_sha256 is .* but this run has"):
            TeacherCache(CACHE, identity(), windows)
        shutil.rmtree(config.at.teacher.model)  # where the weights are not at hand, the cache serves without them
        TeacherCache(CACHE, identity(), windows)


def test_the_records_of_a_capture_are_finite_or_refused(toy, tmp_path):
    broken = StudentLM(toy.model.shape, seed=5).eval()
    with torch.no_grad():
        broken.head_weight[3] = torch.nan
    with pytest.raises(UserError, match=r"logits are not finite in windows"):
        toy.capture(tmp_path, model=broken)
    assert not list(tmp_path.iterdir())
