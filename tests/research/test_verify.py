"""`verify` accepts a teacher's own cache and no other; the live teacher says what its cache says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import sha256_file, write_json
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.research.verify import Replay, allowed_nats, replay
from microlm.runtime.paths import CACHE
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of, sealed
from microlm.teacher.capture import capture, tail_table
from microlm.teacher.recorders import LiveTeacher, Recorder
from tests.support.toy import toy_shards
from tests.support.toy_records import read_block, write_block
from tests.support.workspace import make_workspace, verify, write_own_teacher

N_VOCAB, SEQ_LEN, ROWS, CACHED = 70, 16, 3, 18
TEMPERATURES = (1.0, 2.0, 0.5)
WINDOWS = evenly_spaced(50, CACHED)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=900)


def teacher(seed: int, dtype: torch.dtype = torch.float32) -> StudentLM:
    shape = ModelShape(
        N_VOCAB, 128, layers=2, hidden_size=16, heads=1, head_dim=16, intermediate_size=16, context=32, rope_theta=1e4
    )
    network = StudentLM(shape, seed=seed)
    with torch.no_grad():
        network.head_weight.mul_(30)
    return network.to(dtype).set_activation_dtype(dtype).eval()


def cache_of(
    directory: Path,
    model: StudentLM,
    shards: TokenShards,
    dtype: torch.dtype,
    top_k: int = 5,
    record: str = "full",
) -> TeacherCache:
    identity = CacheIdentity("toy", None, "", N_VOCAB, shards.digest, SEQ_LEN, CACHED, top_k, TEMPERATURES, record)
    directory.mkdir(exist_ok=True)
    capture(Recorder(model, identity, compiled=False), shards, WINDOWS, directory, ROWS, lambda tokens: None)
    write_json(directory / MANIFEST, manifest_of(identity, "", str(dtype), directory))
    return TeacherCache(directory, identity, WINDOWS)


def replayed(model: StudentLM, cache: TeacherCache, shards: TokenShards) -> Replay:
    return replay(model, cache, shards, WINDOWS[[11, 2, 5, 17]], batch_rows=4)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_live_and_cached_teacher_are_equal_bit_for_bit(shards, tmp_path_factory, data):
    model = teacher(data.draw(st.integers(0, 5)))
    top_k, kind = data.draw(st.sampled_from((1, 5, N_VOCAB))), data.draw(st.sampled_from(("full", "compact")))
    cache = cache_of(tmp_path_factory.mktemp("cache"), model, shards, torch.float32, top_k, kind)
    first = ROWS * data.draw(st.integers(0, CACHED // ROWS - 1))
    windows, temperature = WINDOWS[first : first + ROWS], data.draw(st.sampled_from(cache.identity.temperatures))
    batch = read_batch(shards, windows, SEQ_LEN)
    cached = cache.of_batch(batch, temperature)
    record = Recorder(model, cache.identity, compiled=False)
    tables = torch.from_numpy(tail_table(record, shards, WINDOWS, ROWS))
    teacher_at_work = LiveTeacher(record, tables)
    live = teacher_at_work.of_batch(batch, temperature)
    for field in ("ids", "log_p", "log_table"):
        assert torch.equal(getattr(live, field), getattr(cached, field))
    assert not live.log_p.requires_grad and not live.log_p.is_inference()
    with pytest.raises(UserError, match="temperature: 3 is not in the teacher's cache"):
        teacher_at_work.of_batch(batch, 3.0)


@pytest.mark.parametrize("record", ["full", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 5, N_VOCAB])
def test_the_own_teacher_is_accepted_in_any_batch_composition(shards, tmp_path, dtype, top_k, record):
    model = teacher(3, dtype)
    found = replayed(model, cache_of(tmp_path / "cache", model, shards, dtype, top_k, record), shards)
    assert found.positions == 4 * SEQ_LEN
    found.refuse_excess(dtype, CACHE, "toy")
    assert all(name in "\n".join(found.lines(dtype)) for name in ("log_p", "log_tail", "gold", "ids", "allowed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_another_kernel_is_accepted(shards, tmp_path, dtype):
    """float64 activations stand for a machine that sums in another order."""
    found = replayed(teacher(3, torch.float64), cache_of(tmp_path / "c", teacher(3, dtype), shards, dtype), shards)
    assert found.spreads["gold"].largest > 0
    found.refuse_excess(dtype, CACHE, "toy")


@pytest.mark.parametrize("record", ["full", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_teacher_is_refused_by_what_it_says(shards, tmp_path, dtype, record):
    cache = cache_of(tmp_path / "cache", teacher(3, dtype), shards, dtype, record=record)
    found = replayed(teacher(4, dtype), cache, shards)
    with pytest.raises(UserError, match=r"data/teacher: toy differs in log_p by up to .* dvc repro") as error:
        found.refuse_excess(dtype, CACHE, "toy")
    assert "\n" not in str(error.value)


def shift_gold(records: np.ndarray) -> None:
    records["gold"] = np.roll(records["gold"], 1)  # a position late


def swap_ids(records: np.ndarray) -> None:
    records["ids"][:, [0, 4]] = records["ids"][:, [4, 0]]


def forget_the_best(records: np.ndarray) -> None:
    """An id outside the k likeliest in the place of the likeliest, under its own probability or another's."""
    for record in records:
        record["ids"][0] = next(i for i in range(N_VOCAB) if i not in record["ids"])


def renormalize(records: np.ndarray) -> None:
    records["log_p"] -= np.log(np.exp(records["log_p"].astype(np.float32)).sum(-1, keepdims=True))


def drop_tail(records: np.ndarray) -> None:
    records["log_tail"][:, 1] -= 1


def lose_a_number(records: np.ndarray) -> None:
    records["gold"][7] = np.nan


@pytest.mark.parametrize("corrupt", [shift_gold, swap_ids, forget_the_best, renormalize, drop_tail, lose_a_number])
def test_a_cache_made_wrong_is_refused_though_every_checksum_is_right(
    shards, tmp_path, corrupt: Callable[[np.ndarray], None]
):
    model, directory = teacher(3), tmp_path / "cache"
    cache = cache_of(directory, model, shards, torch.float32)
    block = directory / "block-00000.bin"
    records = read_block(block, cache.identity)
    corrupt(records)
    found = replay(model, rewritten(directory, cache.identity, records), shards, WINDOWS, batch_rows=4)
    with pytest.raises(UserError, match="data/teacher: toy differs in"):
        found.refuse_excess(torch.float32, CACHE, "toy")


def rewritten(directory: Path, identity: CacheIdentity, records: np.ndarray) -> TeacherCache:
    """The cache with other records in its only block, and a manifest that names them."""
    block = directory / "block-00000.bin"
    write_block(block, records, identity)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["blocks"] = [{"file": block.name, "sha256": sha256_file(block)}]
    write_json(directory / MANIFEST, sealed(manifest))
    return TeacherCache(directory, identity, WINDOWS)


def test_true_probabilities_of_ids_that_are_not_the_likeliest_are_refused(shards, tmp_path):
    model, directory = teacher(3), tmp_path / "cache"
    identity = cache_of(directory, model, shards, torch.float32).identity
    records = read_block(directory / "block-00000.bin", identity)
    with torch.no_grad():
        log_p = torch.log_softmax(model.logits(model.hidden(read_batch(shards, WINDOWS, SEQ_LEN).tokens)), -1)
    log_p = log_p.flatten(0, 1)
    ids = log_p.topk(identity.top_k + 1).indices[:, 1:]  # the second to the sixth
    records["ids"], records["log_p"] = ids, log_p.gather(1, ids)
    rest = log_p.scatter(1, ids, -torch.inf)
    for column, temperature in enumerate(identity.temperatures):
        records["log_tail"][:, column] = (rest / temperature).logsumexp(-1)
    found = replay(model, rewritten(directory, identity, records), shards, WINDOWS, batch_rows=4)
    with pytest.raises(UserError, match="which ids are the likeliest"):
        found.refuse_excess(torch.float32, CACHE, "toy")


@given(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.floats(0, 1e3))
def test_what_rounding_explains_grows_with_the_logits(dtype, scale):
    largest, mean = allowed_nats(dtype, scale)
    assert largest >= mean > 0
    assert allowed_nats(dtype, 2 * scale) >= (largest, mean)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = make_workspace(tmp_path_factory.mktemp("verify") / "workspace")
    write_own_teacher(top / "another", seed=1)
    shutil.copytree(top / "data" / "tiny-teacher", top / "moved")
    return top


@pytest.mark.parametrize("options", [(), ("--teacher", "moved"), ("--replay-only",)])
def test_the_command_accepts_the_own_teacher_and_reports(workspace, capsys, options):
    assert verify(workspace, "--windows", "5", "--seed", "3", *options) == 0
    printed = capsys.readouterr().out
    assert "verify: 5 of 48 cached windows" in printed
    for name in ("log_p", "log_tail", "gold", "ids", "allowed"):
        assert f"\n  {name}" in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--teacher", "another"), "weights_sha256 is"),
        (("--teacher", "another", "--replay-only"), "another differs in log_p by up to"),
        (("--teacher", "nowhere"), "teacher.model: nowhere"),
        (("--teacher", "data/shards"), "teacher.model: data/shards could not be read"),
        (("--windows", "0"), "--windows: 0 is less than 1"),
        (("--windows", "many"), "--windows: invalid int value"),
        (("--seed", "-1"), "--seed: -1 is less than 0"),
        (("--unknown",), "unrecognized arguments: --unknown"),
    ],
)
def test_the_command_refuses_in_one_line(workspace, capsys, options, told):
    assert verify(workspace, *options) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    complaints = [line for line in lines if line.startswith("error: ")]
    assert len(complaints) == 1 and told in complaints[0]


def test_the_command_refuses_a_teacher_whose_weights_were_changed_in_place(workspace, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy)
    write_own_teacher(copy / "data" / "tiny-teacher", seed=1)
    assert verify(copy) == 1
    assert "manifest.json: weights_sha256 is" in capsys.readouterr().err
    assert verify(copy, "--replay-only") == 1
    assert "differs in log_p by up to" in capsys.readouterr().err
