"""On the card: student, capture and evaluator against the CPU in float32; cached records against live ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from microlm.corpus.batches import read_batch, window_count
from microlm.corpus.shards import TokenShards
from microlm.evaluation.scoring.encoding import Encoded
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.evaluation.tasks.prompts import Question
from microlm.files import write_json
from microlm.models.architecture import ModelShape
from microlm.models.interface import LanguageModel
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of
from microlm.teacher.capture import capture
from microlm.teacher.recorders import LiveTeacher, Recorder
from tests.support.on_cuda import device  # noqa: F401
from tests.support.toy import toy_shards

pytestmark = pytest.mark.cuda
N_VOCAB, SEQ_LEN, ROWS, TOP_K = 1000, 48, 4, 12
SHAPE = ModelShape(
    N_VOCAB, 1024, layers=3, hidden_size=128, heads=2, head_dim=64, intermediate_size=192, context=64, rope_theta=1e4
)
TEMPERATURES = (1.0, 2.5)
NETWORK = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip


def student() -> StudentLM:
    model = StudentLM(SHAPE, seed=1)
    drawn = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            torch.nn.init.normal_(parameter, std=0.1, generator=drawn)  # a fresh one's blocks do nothing
    return model.eval()


def llama() -> TransformersModel:
    torch.manual_seed(3)
    return TransformersModel(LlamaForCausalLM(LlamaConfig(**NETWORK)), N_VOCAB).eval()


def olmo() -> TransformersModel:
    torch.manual_seed(4)
    return TransformersModel(OlmoForCausalLM(OlmoConfig(**NETWORK)), N_VOCAB).eval()


MODELS = {"student": student, "llama": llama, "olmo": olmo}

# a student computes in bfloat16 from weights of float32, which a teacher is not asked to
TEACHERS = [(name, dtype) for name in ("llama", "olmo") for dtype in (torch.float32, torch.bfloat16)]
TEACHERS.append(("student", torch.float32))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=12 * SEQ_LEN + 1)


def identity_of(shards: TokenShards, record: str = "full") -> CacheIdentity:
    windows = window_count(shards, SEQ_LEN)
    said = {"weights_sha256": "weights", "dtype": "torch.float32"}
    return CacheIdentity(
        "toy", None, "toy", N_VOCAB, shards.digest, SEQ_LEN, windows, TOP_K, TEMPERATURES, record, **said
    )  # fmt: skip


def moved(model: LanguageModel, dtype: torch.dtype, device: torch.device) -> LanguageModel:  # noqa: F811
    return model.set_activation_dtype(dtype).to(device) if isinstance(model, StudentLM) else model.to(device, dtype)


def asked(seed: int) -> list[Encoded]:
    """Questions of several lengths; endings of one begin alike."""
    drawn = np.random.default_rng(seed)
    made = []
    for number in range(20):
        context = drawn.integers(0, N_VOCAB, drawn.integers(1, 20))
        endings = tuple(drawn.integers(0, N_VOCAB, drawn.integers(1, 8)) for _ in range(4))
        question = Question("made up", str(number), "", 0, "", ("",) * 4, (), "", ())
        made.append(Encoded(question, context, endings))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_are_the_cpus(name, device):  # noqa: F811
    tokens = torch.randint(0, N_VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    found = []
    with torch.inference_mode():
        for where in (torch.device("cpu"), device):
            model = moved(MODELS[name](), torch.float32, where)
            hidden = model.hidden(tokens.to(where))
            found.append((hidden.cpu(), model.logits(hidden).cpu()))
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gradients_are_the_cpus(device):  # noqa: F811
    tokens = torch.randint(0, N_VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(6))
    found = []
    for where in (torch.device("cpu"), device):
        model = student().to(where).train()
        model.logits(model.hidden(tokens.to(where))).logsumexp(-1).mean().backward()
        found.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        apart = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert float(apart) < 1e-3, name


@pytest.mark.parametrize("name", MODELS)
def test_records_are_the_cpus(name, shards, device):  # noqa: F811
    """Up to rounding: of tokens of nearly the same probability either may come first, or be the last one in."""
    identity, batch = identity_of(shards), read_batch(shards, np.arange(ROWS), SEQ_LEN)
    found = []
    for where in (torch.device("cpu"), device):
        model = moved(MODELS[name](), torch.float32, where)
        labels = Recorder(model, identity, compiled=False).labels(batch)
        found.append((identity.layout.unpack(labels.rows.cpu()), labels.gold.cpu()))
    (theirs, their_gold), (ours, our_gold) = found
    torch.testing.assert_close(ours.log_p.float(), theirs.log_p.float(), rtol=0, atol=2e-2)
    torch.testing.assert_close(ours.log_tail, theirs.log_tail, rtol=0, atol=1e-3)
    torch.testing.assert_close(our_gold, their_gold, rtol=1e-3, atol=1e-3)
    assert float((ours.ids == theirs.ids).float().mean()) > 0.99


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["tree", "cached", "plain"])
def test_scores_are_the_cpus_one_at_a_time(name, backend, device):  # noqa: F811
    expected = score(MODELS[name](), asked(7), 1, backend="plain")
    found = score(moved(MODELS[name](), torch.float32, device), asked(7), 512, backend=backend)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_validation_loss_is_the_cpus(shards, device):  # noqa: F811
    lengths = np.ones(N_VOCAB, np.int32)
    found = [loss_on(student().to(where), shards, lengths, SEQ_LEN, None, ROWS) for where in ("cpu", device)]
    np.testing.assert_allclose(found[1].window_nats, found[0].window_nats, rtol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), TEACHERS)
@pytest.mark.parametrize("record", ["full", "compact"])
def test_cached_records_are_the_live_ones_bit_for_bit(name, record, dtype, shards, device, tmp_path: Path):  # noqa: F811
    """Of batches of the same composition."""
    identity, windows = identity_of(shards, record), np.arange(window_count(shards, SEQ_LEN))
    model = moved(MODELS[name](), dtype, device)
    at_work = Recorder(model, identity, compiled=False)
    capture(at_work, shards, windows, tmp_path, ROWS, int)
    write_json(tmp_path / MANIFEST, manifest_of(identity, "weights", "torch.float32", tmp_path))
    cache = TeacherCache(tmp_path, identity, windows)
    live = LiveTeacher(at_work, cache.tables)
    for start in range(0, len(windows), ROWS):
        batch = read_batch(shards, windows[start : start + ROWS], SEQ_LEN)
        batch = replace(batch, rows=batch.rows.to(device))
        for temperature in TEMPERATURES:
            stored, said = cache.of_batch(batch, temperature), live.of_batch(batch, temperature)
            assert torch.equal(stored.ids, said.ids)
            assert torch.equal(stored.log_p, said.log_p)
            assert torch.equal(stored.log_table, said.log_table)
