"""The top-k cache: what a record says, what a reader refuses, what a killed capture keeps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import write_json
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.teacher import recorders
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of
from microlm.teacher.capture import capture
from microlm.teacher.recorders import Recorder, top_k
from tests.support.dense_tails import lump
from tests.support.toy import toy_shards
from tests.support.toy_records import records_of

N_VOCAB, SEQ_LEN = 70, 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=900)


@pytest.fixture(scope="module")
def model() -> StudentLM:
    shape = ModelShape(
        N_VOCAB, 128, layers=1, hidden_size=16, heads=1, head_dim=16, intermediate_size=16, context=32, rope_theta=1e4
    )
    network = StudentLM(shape, seed=5)
    with torch.no_grad():
        network.head_weight.mul_(30)
    return network.eval()


def identity_of(shards: TokenShards, **changes) -> CacheIdentity:
    identity = CacheIdentity(
        "toy", None, "fingerprint", N_VOCAB, shards.digest, SEQ_LEN, windows=20, top_k=5, temperatures=(1.0, 2.0)
    )
    return replace(identity, **changes)


def write_cache(directory: Path, model: StudentLM, shards: TokenShards, identity: CacheIdentity) -> np.ndarray:
    windows = evenly_spaced(50, identity.windows)
    directory.mkdir(exist_ok=True)
    capture(Recorder(model, identity, False), shards, windows, directory, batch_rows=3, progress=lambda tokens: None)
    write_json(directory / MANIFEST, manifest_of(identity, "sha", "float32", directory))
    return windows


def test_records_are_the_lumped_teacher_at_every_captured_temperature(model, shards, tmp_path):
    identity = identity_of(shards)
    windows = write_cache(tmp_path / "cache", model, shards, identity)
    cache = TeacherCache(tmp_path / "cache", identity, windows)
    chosen = windows[[7, 2]]  # any order, any subset
    batch = read_batch(shards, chosen, SEQ_LEN)
    with torch.no_grad():
        z = model.logits(model.hidden(batch.tokens)).flatten(0, 1)
    for temperature in identity.temperatures:
        teacher = cache.of_batch(batch, temperature)
        expected = lump(torch.log_softmax(z / temperature, -1), teacher.ids)
        torch.testing.assert_close(teacher.log_p, expected, rtol=2e-3, atol=2e-3)  # float16 in the records
    assert torch.equal(cache.of_batch(batch, 1.0).ids.sort(-1).values, z.topk(5).indices.sort(-1).values)
    gold = torch.log_softmax(z, -1).gather(1, batch.targets.reshape(-1, 1))[:, 0]
    torch.testing.assert_close(torch.from_numpy(cache.gold(chosen).ravel()), gold, rtol=1e-5, atol=1e-5)


def test_caching_the_whole_vocabulary_leaves_an_empty_tail(model, shards):
    identity = identity_of(shards, top_k=N_VOCAB)
    records = records_of(Recorder(model, identity, False), read_batch(shards, np.array([0, 1]), SEQ_LEN))
    assert np.isneginf(records["log_tail"]).all()
    assert np.exp(records["log_p"].astype(np.float64)).sum(-1) == pytest.approx(1, abs=5e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(1, 3))
def test_top_k_finds_the_largest(seed, k, rows):
    z = torch.randn(rows, 2 * recorders.GROUPS, generator=torch.Generator().manual_seed(seed)).bfloat16()
    values, ids = top_k(z, k)
    assert torch.equal(values, z.topk(k).values)
    assert torch.equal(z.gather(1, ids), values) and all(len(set(row.tolist())) == k for row in ids)


@pytest.mark.parametrize(("field", "value"), [
    ("teacher", "another"), ("revision", "abc"), ("tokenizer", "other"), ("n_vocab", N_VOCAB - 1), ("corpus", "other"),
    ("seq_len", 8), ("windows", 19), ("top_k", 4), ("temperatures", (1.0,)),
])  # fmt: skip
def test_a_cache_of_anything_else_is_refused_by_the_field_that_differs(model, shards, tmp_path, field, value):
    windows = write_cache(tmp_path / "cache", model, shards, identity_of(shards))
    with pytest.raises(UserError, match=rf"manifest.json: {field} is .* but this run has") as error:
        TeacherCache(tmp_path / "cache", identity_of(shards, **{field: value}), windows)
    assert "\n" not in str(error.value) and "dvc repro" in str(error.value)


def test_truncated_flipped_or_missing_blocks_are_refused(model, shards, tmp_path):
    identity = identity_of(shards)
    windows = write_cache(tmp_path / "cache", model, shards, identity)
    block = tmp_path / "cache" / "block-00000.bin"
    whole = block.read_bytes()
    for damaged, told in ((whole[:-1], "bytes long"), (bytes([whole[0] ^ 1]) + whole[1:], "sha256")):
        block.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"block-00000.bin: .*{told}"):
            TeacherCache(tmp_path / "cache", identity, windows)
    block.unlink()
    with pytest.raises(UserError, match=r"block-00000.bin is not there"):
        TeacherCache(tmp_path / "cache", identity, windows)


def test_a_killed_capture_goes_on_at_the_next_block_and_gives_the_same_bytes(model, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("microlm.teacher.cache.SMALLEST_BLOCK", 3 * SEQ_LEN * identity_of(shards).token_bytes)
    identity, windows = identity_of(shards), evenly_spaced(50, 20)
    assert len(identity.blocks()) > 4

    def killed(tokens: int) -> None:
        if len(list((tmp_path / "broken").glob("block-*"))) == 2:
            raise KeyboardInterrupt

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    record = Recorder(model, identity, False)
    total = capture(record, shards, windows, tmp_path / "whole", 3, lambda tokens: None)
    with pytest.raises(KeyboardInterrupt):
        capture(record, shards, windows, tmp_path / "broken", 3, killed)
    rest = capture(record, shards, windows, tmp_path / "broken", 3, lambda tokens: None)
    assert 0 < rest < total == 20 * SEQ_LEN
    assert manifest_of(identity, "", "", tmp_path / "whole") == manifest_of(identity, "", "", tmp_path / "broken")
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_a_window_that_is_not_cached_is_a_key_error(model, shards, tmp_path):
    identity = identity_of(shards)
    cache = TeacherCache(tmp_path / "cache", identity, write_cache(tmp_path / "cache", model, shards, identity))
    with pytest.raises(KeyError):
        cache.read(np.array([1]))
