"""The HellaSwag engine against plain scoring, against build-nanogpt's own arithmetic, and against bad input."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from microlm.errors import UserError
from microlm.evaluation.engine import (
    PackedItem,
    block_mask,
    collate,
    hellaswag_accuracy,
    pack_items,
    score,
    score_plain,
)
from microlm.evaluation.engine import plan as plan_batches
from microlm.evaluation.tasks import HellaSwagItem, hellaswag_items, stratified_subset
from microlm.language_model import LanguageModel
from microlm.model import ModelShape, StudentLM
from microlm.objective.fused_head import token_nats

VOCAB, CONTEXT = 97, 96
NATS = [f"nats_{k}" for k in range(4)]
WORDS = ("a", "cat", "sits", "on", "the", "mat", "while", "two", "dogs", "run", "along", "river", "nobody", "knows")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of a busy machine wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WordTokenizer:
    """Ids 1..96 by a word's letters; the space before a word belongs to it, as in byte-level BPE."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([1 + sum(w.encode()) % (VOCAB - 1) for w in text.split()], np.int32) for text in texts]


class TransformersModel(nn.Module):
    """A transformers causal model as a `LanguageModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.n_vocab, self.context = model, VOCAB, CONTEXT

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.inner.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state

    @property
    def head_weight(self) -> Tensor:
        return self.inner.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        return self.inner.lm_head(hidden)[..., : self.n_vocab]


def _model(family: str) -> LanguageModel:
    """Two layers, random weights large enough that every token of context matters."""
    torch.manual_seed(0)
    if family == "student":
        model = StudentLM(ModelShape(VOCAB, 128, 2, 32, 2, 16, 64, CONTEXT, 10000.0))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 128, "max_position_embeddings": CONTEXT, "initializer_range": 0.3, "num_key_value_heads": 2}
    if family == "llama":
        return TransformersModel(LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")))
    return TransformersModel(Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, attn_implementation="sdpa")))


@pytest.fixture(scope="module", params=["llama", "qwen3", "student"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return _model(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return _model("llama")


def _items(n: int, seed: int = 0) -> list[HellaSwagItem]:
    random = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(low, high)))

    return [
        HellaSwagItem(
            index=i,
            source_id=f"{random.choice(['wikihow', 'activitynet'])}~{i // 2}",
            split_type=str(random.choice(["indomain", "zeroshot"])),
            context=text(1, 30),
            endings=tuple(text(1, 20) for _ in range(4)),
            label=int(random.integers(4)),
        )
        for i in range(n)
    ]


def _packed(items: list[HellaSwagItem], context: int = CONTEXT) -> list[PackedItem]:
    return pack_items(items, WordTokenizer(), context)


@torch.no_grad()
def _build_nanogpt(model: LanguageModel, item: HellaSwagItem) -> tuple[Tensor, Tensor]:
    """Summed and mean loss of the four endings by the arithmetic of build-nanogpt's hellaswag.py: four padded rows."""
    encode = WordTokenizer().encode_batch
    context = encode([item.context])[0].tolist()
    rows = [context + encode([" " + ending])[0].tolist() for ending in item.endings]
    tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for k, row in enumerate(rows):
        tokens[k, : len(row)] = torch.tensor(row)
        mask[k, len(context) : len(row)] = 1
    logits = model.logits(model.hidden(tokens))[:, :-1].contiguous()
    losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="none")
    losses = losses.view(4, -1) * mask[:, 1:]
    return losses.sum(1), losses.sum(1) / mask[:, 1:].sum(1)


def test_shared_context_scores_are_those_of_plain_scoring(model: LanguageModel) -> None:
    packed = _packed(_items(24))
    shared, plain = score(model, packed, batch_tokens=512), score_plain(model, packed)
    np.testing.assert_allclose(shared[NATS], plain[NATS], atol=1e-4)
    exact = [column for column in shared if "nats" not in column]
    assert shared[exact].equals(plain[exact])


def test_scores_and_answers_are_those_of_build_nanogpt(model: LanguageModel) -> None:
    items = _items(16, seed=1)
    table = score(model, _packed(items), batch_tokens=700)
    for row, item in enumerate(items):
        sums, means = _build_nanogpt(model, item)
        np.testing.assert_allclose(table.loc[row, NATS].astype(float), sums, atol=1e-4)
        assert table.loc[row, "prediction"] == sums.argmin()
        assert table.loc[row, "prediction_norm"] == means.argmin()
        assert table.loc[row, "correct_norm"] == (means.argmin().item() == item.label)


def test_rows_are_kept_in_order_with_their_lengths_and_bytes(llama: LanguageModel) -> None:
    items = _items(9)
    table = score(llama, _packed(items), batch_tokens=256)
    assert table["item"].tolist() == [item.index for item in items]
    assert table["source_id"].tolist() == [item.source_id for item in items]
    for row, item in enumerate(items):
        for k, ending in enumerate(item.endings):
            assert table.loc[row, f"bytes_{k}"] == len((" " + ending).encode())
            assert table.loc[row, f"tokens_{k}"] == len(ending.split())
        assert table.loc[row, "gold_nats"] == table.loc[row, f"nats_{item.label}"]
        assert table.loc[row, "gold_bytes"] == table.loc[row, f"bytes_{item.label}"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), changed=st.integers(0, 3), ending=st.lists(st.sampled_from(WORDS), min_size=1))
def test_changing_one_ending_changes_no_other_score(seed: int, changed: int, ending: list[str]) -> None:
    model, (item,) = _model("qwen3"), _items(1, seed)
    endings = [" ".join(ending[:15]) if k == changed else old for k, old in enumerate(item.endings)]
    before = score(model, _packed([item]), 512)
    after = score(model, _packed([dataclasses.replace(item, endings=tuple(endings))]), 512)
    others = [name for k, name in enumerate(NATS) if k != changed]
    np.testing.assert_allclose(after[others], before[others], atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)))
def test_permuting_the_endings_permutes_the_scores(seed: int, order: list[int]) -> None:
    model, (item,) = _model("llama"), _items(1, seed)
    before = score(model, _packed([item]), 512).loc[0, NATS].to_numpy(float)
    after = score(model, _packed([dataclasses.replace(item, endings=tuple(item.endings[k] for k in order))]), 512)
    np.testing.assert_allclose(after.loc[0, NATS].astype(float), before[list(order)], atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 97, 256, 4096, 10**9])
def test_batch_size_and_padding_change_no_score(llama: LanguageModel, batch_tokens: int) -> None:
    packed = _packed(_items(20, seed=2))
    alone = score(llama, packed, batch_tokens=1)
    np.testing.assert_allclose(score(llama, packed, batch_tokens)[NATS], alone[NATS], atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3000))
def test_batches_hold_every_question_once_within_the_budget(n: int, batch_tokens: int) -> None:
    packed = _packed(_items(n))
    batches = plan_batches(packed, batch_tokens)
    assert sorted(np.concatenate(batches)) == list(range(n))
    for indices in batches:
        batch = collate([packed[i] for i in indices])
        assert batch.tokens.numel() <= batch_tokens or len(indices) == 1
        assert batch.tokens.shape[1] % 32 == 0
        assert all(batch.tokens.shape[1] - len(packed[i].tokens) < 32 for i in indices)


def test_mask_lets_an_ending_see_the_context_and_itself_only() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 5, 5]])
    expected = ["1000000", "1100000", "1110000", "1111000", "1100100", "1100010", "1100011"]
    assert ["".join(map(str, row.int().tolist())) for row in block_mask(segments)[0, 0]] == expected


def test_the_head_runs_at_the_scored_positions_alone(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = _packed(_items(12)), []
    whole = score(llama, packed, 10**6)

    def counted(hidden: Tensor, *rest: object) -> Tensor:
        rows.append(len(hidden))
        return token_nats(hidden, *rest)

    monkeypatch.setattr("microlm.evaluation.engine.HEAD_ROWS", 50)
    monkeypatch.setattr("microlm.evaluation.engine.token_nats", counted)
    chunked = score(llama, packed, 10**6)
    assert sum(rows) == sum(len(ending) for item in packed for ending in item.endings) and max(rows) <= 50
    np.testing.assert_allclose(chunked[NATS], whole[NATS], atol=1e-4)


def test_a_context_too_long_loses_its_start_and_is_counted(llama: LanguageModel) -> None:
    item = dataclasses.replace(_items(1)[0], context=" ".join(WORDS * 3), endings=("a b", "c", "d e f", "g"))
    (packed,) = _packed([item], context=20)
    assert packed.truncated and packed.positions.max() == 19
    end = " ".join((WORDS * 3)[-18:])
    (same,) = _packed([dataclasses.replace(item, context=end)], context=20)
    assert not same.truncated
    np.testing.assert_allclose(score(llama, [packed], 512)[NATS], score(llama, [same], 512)[NATS])


def test_an_ending_longer_than_the_model_reads_is_refused() -> None:
    item = dataclasses.replace(_items(1)[0], index=7, endings=("one " * 30, "a", "b", "c"))
    with pytest.raises(UserError, match=r"question 7 .*30 tokens.*model\.context"):
        _packed([item], context=29)


def test_scoring_leaves_mode_random_state_and_gradients_alone(llama: LanguageModel) -> None:
    llama.train()
    llama.inner.model.layers[0].eval()
    modes, state = [m.training for m in llama.modules()], torch.get_rng_state()
    hellaswag_accuracy(llama, _packed(_items(4)), 512)
    assert [m.training for m in llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in llama.parameters()) and torch.is_grad_enabled()
    llama.eval()


def test_training_figures_are_those_of_the_table(llama: LanguageModel) -> None:
    packed = _packed(_items(30))
    table, figures = score(llama, packed, 512), hellaswag_accuracy(llama, packed, 512)
    assert figures["acc_norm"] == table["correct_norm"].mean() and figures["acc"] == table["correct"].mean()
    bits = table["gold_nats"].sum() / table["gold_bytes"].sum() / math.log(2)
    assert figures["gold_bpb"] == pytest.approx(bits)


def test_bfloat16_models_are_scored_in_float32() -> None:
    model = _model("llama").to(torch.bfloat16)
    packed = _packed(_items(6))
    shared, plain = score(model, packed, 512), score_plain(model, packed)
    np.testing.assert_allclose(shared[NATS], plain[NATS], rtol=0.02)


def test_a_broken_model_is_named_with_the_question() -> None:
    model, items = _model("llama"), [dataclasses.replace(item, index=40 + i) for i, item in enumerate(_items(3))]
    nn.init.constant_(model.inner.lm_head.weight, math.inf)
    with pytest.raises(UserError, match="student gives HellaSwag question 40 a score that is not a finite number"):
        score(model, _packed(items), 512, name="student")


def test_progress_counts_every_question(llama: LanguageModel) -> None:
    counts: list[int] = []
    score(llama, _packed(_items(10)), 300, counts.append)
    assert sum(counts) == 10 and len(counts) > 1


def _arrow(path: Path, items: list[HellaSwagItem], **changed: object) -> Path:
    rows = [
        {"source_id": i.source_id, "split_type": i.split_type, "ctx": i.context, "endings": list(i.endings)}
        | {"label": str(i.label)}
        | changed
        for i in items
    ]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return path


def test_questions_are_read_as_they_were_written(tmp_path: Path) -> None:
    items = _items(12)
    assert hellaswag_items(_arrow(tmp_path / "a.arrow", items)) == items


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "label", "endings"])
def test_a_damaged_file_is_named_with_its_mend(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "questions.arrow"
    changed = {"label": {"label": "9"}, "endings": {"endings": ["one"]}}.get(damage, {})
    whole = _arrow(path, _items(50), **changed).read_bytes()
    if damage in ("cut", "noise", "empty"):
        path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\x07" * 5000, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"questions\.arrow .*dvc repro -f -s fetch"):
        hellaswag_items(path)


def test_an_absent_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro fetch"):
        hellaswag_items(tmp_path / "none.arrow")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.data())
def test_subset_is_fixed_in_order_and_proportional(total: int, data: st.DataObject) -> None:
    items = _items(total)
    n = data.draw(st.integers(1, total))
    subset = stratified_subset(items, n)
    assert len(subset) == n and subset == stratified_subset(items[::-1], n)
    assert [item.index for item in subset] == sorted({item.index for item in subset})

    def strata(part: list[HellaSwagItem]) -> Counter:
        return Counter((i.split_type, i.source_id.split("~")[0], i.label) for i in part)

    for stratum, size in strata(items).items():
        assert abs(strata(subset)[stratum] - n * size / total) < 1


def test_a_subset_of_more_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.items=9"):
        stratified_subset(_items(8), 9)
