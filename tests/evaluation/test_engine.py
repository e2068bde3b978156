"""Scores of tree attention and of kept keys and values against plain scoring, that against transformers' own logits."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    OlmoConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from microlm.errors import UserError
from microlm.evaluation.scoring.backends import block_mask, collate, plan, row_length
from microlm.evaluation.scoring.encoding import Encoded
from microlm.evaluation.scoring.engine import choose_backend, score
from microlm.evaluation.tasks.prompts import Question
from microlm.models.architecture import ModelShape
from microlm.models.interface import LanguageModel
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel

VOCAB, PADDED, CONTEXT, WINDOW = 97, 128, 96, 24
TWO_LAYERS = {"vocab_size": PADDED, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = TWO_LAYERS | {"intermediate_size": 64, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
OLD = {"vocab_size": PADDED, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**OLD),
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=1),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=1),
    "gpt-neox": GPTNeoXConfig(**LLAMA),
    "olmo": OlmoConfig(**LLAMA),
    "bloom": BloomConfig(**TWO_LAYERS, initializer_range=0.3),  # positions by distance in the row
    "mpt": MptConfig(vocab_size=PADDED, d_model=32, n_heads=2, n_layers=2, max_seq_len=CONTEXT),  # the same
    "gpt-neo": GPTNeoConfig(
        vocab_size=PADDED, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=CONTEXT, window_size=8,
        attention_types=[[["global", "local"], 1]], initializer_range=0.3,
    ),
    "mamba": MambaConfig(vocab_size=PADDED, hidden_size=32, num_hidden_layers=2, state_size=4),  # keeps no keys
    "phi": PhiConfig(**LLAMA),  # a bias in the head, as GPT-J
    "gpt-j": GPTJConfig(**OLD, rotary_dim=8),
    "gemma2": Gemma2Config(**LLAMA, head_dim=16, num_key_value_heads=1, final_logit_softcapping=2.0),
    "cohere2": Cohere2Config(**LLAMA, num_key_value_heads=1, logit_scale=0.3),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
    "mistral": MistralConfig(**LLAMA, num_key_value_heads=1, sliding_window=WINDOW),
}  # fmt: skip
CHOICE = {"bloom": "cached", "mpt": "cached", "gpt-neo": "cached", "mamba": "plain"}  # all others: tree
score_plain = partial(score, batch_tokens=1, backend="plain")  # the reference: one ending at a time
MANY = 10**6  # tokens: everything in one batch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of a busy machine wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def student(kind: type[StudentLM] = StudentLM) -> StudentLM:
    model = kind(ModelShape(VOCAB, PADDED, 2, 32, 2, 16, 64, CONTEXT, 10000.0))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def built(family: str) -> LanguageModel:
    """Two layers, random weights large enough that every token of context matters."""
    if family == "student":
        return student()
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # biases begin at zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return TransformersModel(network, VOCAB)


STUDENT, LLAMA_MODEL = built("student"), built("llama")


def question(context: Sequence[int], *endings: Sequence[int], number: int = 0) -> Encoded:
    asked = Question("toy", str(number), "", 0, "", ("",) * len(endings), (), "", ())
    return Encoded(asked, np.array(context), tuple(np.array(ending) for ending in endings))


def drawn(n: int, seed: int = 0) -> list[Encoded]:
    """Questions of 2 to 6 endings; in every third, all endings are one token."""
    random = np.random.default_rng(seed)

    def ids(longest: int) -> np.ndarray:
        return random.integers(0, VOCAB, random.integers(1, longest + 1))

    return [
        question(ids(25), *(ids(9 if i % 3 else 1) for _ in range(random.integers(2, 7))), number=i) for i in range(n)
    ]


PREFIX = np.random.default_rng(9).integers(0, VOCAB, 17)


def behind(prefix: np.ndarray, questions: list[Encoded]) -> list[Encoded]:
    return [replace(q, context=np.concatenate([prefix, q.context])) for q in questions]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], atol: float = 1e-4) -> None:
    assert [len(nats) for nats in ours] == [len(nats) for nats in theirs]
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), rtol=0, atol=atol)


@torch.no_grad()
def by_transformers(model: TransformersModel, questions: list[Encoded]) -> list[np.ndarray]:
    def nats(context: np.ndarray, ending: np.ndarray) -> float:
        tokens = torch.from_numpy(np.concatenate([context, ending]))
        log_p = model.network(tokens[None], use_cache=False).logits[0, :-1, :VOCAB].log_softmax(-1)
        return -log_p.gather(1, tokens[1:, None])[len(context) - 1 :].sum().item()

    return [np.array([nats(q.context, ending) for ending in q.endings]) for q in questions]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_network_is_scored_as_its_own_logits_say_by_the_way_it_allows(family: str) -> None:
    model, questions = built(family), drawn(9)
    model.refuse_foreign_logits(family)
    expected, after = by_transformers(model, questions), by_transformers(model, behind(PREFIX, questions))
    assert_same(score_plain(model, questions), expected)
    assert_same(score(model, questions, 256), expected)
    assert_same(score(model, questions, 256, PREFIX), after)
    way = CHOICE.get(family, "tree")
    assert choose_backend(model).backend == choose_backend(model, after_prefix=True).backend == way
    if way == "tree":
        assert_same(score(model, questions, 256, backend="cached"), expected)


@pytest.mark.parametrize("backend", ["tree", "cached", "plain"])
def test_student_scores_are_those_of_plain_scoring_with_and_without_a_prefix(backend: str) -> None:
    questions = drawn(24)
    assert_same(score(STUDENT, questions, 512, backend=backend), score_plain(STUDENT, questions))
    after = score(STUDENT, questions, 512, PREFIX, backend=backend)
    assert_same(after, score_plain(STUDENT, behind(PREFIX, questions)))
    apart = [replace(q, shares_prefix=i % 2 == 0) for i, q in enumerate(questions)]
    alone = score_plain(STUDENT, questions)
    mixed = [after[i] if q.shares_prefix else alone[i] for i, q in enumerate(apart)]
    assert_same(score(STUDENT, apart, 512, PREFIX, backend=backend), mixed)


ENDING = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
ASKED = st.builds(question, ENDING, ENDING, ENDING, ENDING, ENDING)


@settings(max_examples=25)
@given(ASKED, st.sampled_from(["tree", "cached"]), st.integers(0, 3), ENDING, st.booleans())
def test_changing_one_ending_changes_no_other_score(
    asked: Encoded, backend: str, changed: int, ending: list[int], shared: bool
) -> None:
    endings = tuple(np.array(ending) if k == changed else old for k, old in enumerate(asked.endings))
    prefix = PREFIX if shared else PREFIX[:0]
    (before,) = score(STUDENT, [asked], MANY, prefix, backend=backend)
    (after,) = score(STUDENT, [replace(asked, endings=endings)], MANY, prefix, backend=backend)
    np.testing.assert_allclose(np.delete(after, changed), np.delete(before, changed), rtol=1e-5, atol=1e-4)


@settings(max_examples=25)
@given(ASKED, st.sampled_from(["tree", "cached"]), st.permutations(range(4)))
def test_permuting_the_endings_permutes_the_scores(asked: Encoded, backend: str, order: list[int]) -> None:
    (before,) = score(LLAMA_MODEL, [asked], MANY, backend=backend)
    turned = replace(asked, endings=tuple(asked.endings[k] for k in order))
    (after,) = score(LLAMA_MODEL, [turned], MANY, backend=backend)
    np.testing.assert_allclose(after, before[list(order)], rtol=1e-5)


@pytest.mark.parametrize("backend", ["tree", "cached"])
@pytest.mark.parametrize("batch_tokens", [97, 256, MANY])
def test_batch_size_order_and_padding_change_no_score(backend: str, batch_tokens: int) -> None:
    questions = drawn(30, seed=2)
    alone = score(LLAMA_MODEL, questions, 1, PREFIX, backend=backend)
    order = np.random.default_rng(3).permutation(len(questions))
    shuffled = score(LLAMA_MODEL, [questions[i] for i in order], batch_tokens, PREFIX, backend=backend)
    for place, nats in zip(order, shuffled):
        np.testing.assert_allclose(nats, alone[place], rtol=1e-5)


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_the_head_runs_once_for_each_scored_position(family: str) -> None:
    """What the endings share, the end of their context, is one position; of endings of one token it is all."""
    seen: list[int] = []

    class Counting(TransformersModel):
        def logits(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().logits(hidden)

    model = Counting(built(family).network, VOCAB)
    whole = score_plain(model, single := [q for q in drawn(30) if all(len(e) == 1 for e in q.endings)])
    seen.clear()
    assert_same(score(model, single, MANY, backend="tree"), whole)
    assert sum(seen) == len(single)
    score(model, longer := drawn(8, seed=5)[1:3], MANY, backend="tree")
    later = sum(len(ending) - 1 for q in longer for ending in q.endings)
    assert sum(seen) == len(single) + 2 + (0 if model.plain_head else later)


def test_rows_beyond_a_sliding_window_are_scored_one_by_one_and_counted() -> None:
    model, questions = built("mistral"), drawn(20)
    beyond = sum(len(q.context) + max(len(e) for e in q.endings) - 1 > WINDOW for q in questions)
    assert 0 < beyond < len(questions)
    used: Counter[str] = Counter()
    assert_same(score(model, questions, 256, used=used), by_transformers(model, questions))
    assert used == {"tree": len(questions) - beyond, "plain": beyond}


class Mended(StudentLM):
    """The student with what a GPU's kernel, or a mistake of ours, could do to the rows of a batch."""

    fault = ""

    def hidden(self, tokens, positions=None, mask=None, prefix=None):
        if self.fault == "mask" and mask is not None:
            mask = torch.ones_like(mask).tril(mask.shape[-1] - mask.shape[-2])
        if self.fault == "positions":
            positions = None
        found = super().hidden(tokens, positions, mask, prefix)
        if self.fault == "rows" and mask is not None:
            found = found.flip(0)
        if self.fault == "rounding" and mask is not None:
            noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.dtype)
            found = found + 2 * torch.finfo(found.dtype).eps * found.abs() * noise
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after_prefix", [False, True])
@pytest.mark.parametrize(
    ("fault", "way"),
    [("", "tree"), ("rounding", "tree"), ("mask", "cached"), ("positions", "cached"), ("rows", "cached")],
)
def test_the_trial_tells_a_fault_from_rounding_in_either_precision(
    fault: str, way: str, after_prefix: bool, dtype: torch.dtype
) -> None:
    model = student(Mended).set_activation_dtype(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # a context that matters, as to a trained model
    model.fault = fault
    assert choose_backend(model, after_prefix).backend == way


def test_a_slower_way_is_told_once_with_what_differs_and_by_how_much(capfd: pytest.CaptureFixture[str]) -> None:
    model, questions = student(Mended), drawn(3)
    score(model, questions, 512, name="a good one")
    assert capfd.readouterr().err == ""
    model.fault = "mask"
    for _ in range(2):
        score(model, questions, 512, name="models/x")
    (line,) = capfd.readouterr().err.splitlines()
    told = r"warning: models/x is scored by `cached`: `tree` is off by [\d.]+ nats on an ending, rounding explains 0.0"
    assert re.match(told, line)
    score(built("mamba"), questions, 512, name="some/mamba")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: some/mamba is scored by `plain`, one ending at a time: `tree` ends in ")
    assert re.search(r"; `cached` is off by [\d.]+ nats on an ending, rounding explains 0.0", line)


def test_a_head_of_an_unknown_kind_is_refused_by_the_models_name() -> None:
    model = built("llama")
    model.network.lm_head.register_forward_hook(lambda module, inputs, output: output.abs())
    with pytest.raises(UserError, match="some/model: its logits are not what") as error:
        model.refuse_foreign_logits("some/model")
    assert "\n" not in str(error.value)


def test_a_live_model_in_training_is_left_as_it_was_and_its_compiled_block_unused() -> None:
    model, questions = student().train(), drawn(6)
    model.model.layers[0].eval()
    expected = score_plain(model, questions)
    model._training_block = lambda *_: pytest.fail("shapes vary here: each would be compiled anew")
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert_same(score(model, questions, 256, PREFIX[:0]), expected)
    score(model, questions, 256, PREFIX)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_models_are_scored_in_float32_by_the_same_way() -> None:
    model, questions = student().set_activation_dtype(torch.bfloat16), drawn(12)
    assert choose_backend(model).backend == choose_backend(model, after_prefix=True).backend == "tree"
    ours, plain = score(model, questions, 512), score_plain(model, questions)
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(plain), rtol=0.05)


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_a_broken_model_is_named_with_task_and_question(backend: str) -> None:
    model = student()
    nn.init.constant_(model.head_weight, torch.inf)
    told = "models/student gives toy question 40 a score that is not a finite number"
    with pytest.raises(UserError, match=told) as error:
        score(model, [question([1, 2], [3], [4], number=40)], 512, name="models/student", backend=backend)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["tree", "cached", "plain"])
def test_progress_counts_every_question(backend: str) -> None:
    counts: list[int] = []
    score(STUDENT, drawn(10), 100, progress=counts.append, backend=backend)
    assert sum(counts) == 10 and len(counts) > 1


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 3000))
def test_batches_hold_every_question_once_within_the_budget(n: int, batch_tokens: int) -> None:
    questions = drawn(n)
    batches = plan(questions, batch_tokens)
    assert sorted(np.concatenate(batches)) == list(range(n))
    for indices in batches:
        tokens = collate([questions[i] for i in indices])[0][0]
        assert tokens.numel() <= batch_tokens or len(indices) == 1
        assert tokens.shape[1] % 8 == 0
        assert all(tokens.shape[1] - row_length(questions[i]) < 32 for i in indices)


def test_mask_lets_an_ending_see_prefix_context_and_itself_only() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, -1, -1]])
    expected = ["1000000", "1100000", "1110000", "1111000", "1100100", "1100010", "1100011"]
    for before in (0, 3):
        rows = block_mask(segments, before)[0, 0].int().tolist()
        assert ["".join(map(str, row)) for row in rows] == ["1" * before + row for row in expected]
