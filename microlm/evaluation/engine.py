"""Score the endings of many questions on a live language model, each context read once.

A question is one row [ctx | e1[:-1] | e2[:-1] | e3[:-1] | e4[:-1]]. Positions restart after ctx, and a block mask lets
an ending see ctx and itself, so each ending is scored as if it stood alone after ctx. The language model head runs at
the scored positions only: those that predict a token of an ending.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from microlm.errors import UserError
from microlm.evaluation.protocols import BatchEncoder, EncodedItem, answers, encode_completion
from microlm.evaluation.tasks import ENDINGS, HellaSwagItem
from microlm.language_model import LanguageModel
from microlm.objective.fused_head import token_nats

LENGTH_MULTIPLE = 32  # rows are padded to it, so that a compiled model meets few shapes
HEAD_ROWS = 4096  # positions in one pass of the head
PADDING = ENDINGS + 1  # its segment number; 0 is the context, 1..4 the endings


@dataclass(frozen=True)
class PackedItem(EncodedItem):
    """A question laid out as one row of N tokens (int64 arrays).

    `source` [S] is the position in the row whose hidden state predicts `target` [S], a token of ending `ending` [S].
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    source: np.ndarray
    target: np.ndarray
    ending: np.ndarray
    truncated: bool


def pack_items(items: Sequence[HellaSwagItem], tokenizer: BatchEncoder, context_limit: int) -> list[PackedItem]:
    """Encode and lay out questions. One too long for `context_limit` positions loses the start of its context.

    Raises:
        UserError: an ending alone fills the limit.
    """
    return [_lay_out(item, context_limit) for item in encode_completion(items, tokenizer)]


def _lay_out(item: EncodedItem, context_limit: int) -> PackedItem:
    longest = max(len(ending) for ending in item.endings)
    room = context_limit - (longest - 1)
    if room < 1:
        raise UserError(
            f"HellaSwag question {item.index} has an ending of {longest} tokens, the model only {context_limit} "
            f"positions; raise model.context in params.yaml"
        )
    context = item.context[-room:]
    start = len(context)
    inputs = [len(ending) - 1 for ending in item.endings]
    begins = start + np.cumsum([0, *inputs[:-1]])
    # the first token of an ending is predicted at the context's end, token j at the ending's own token j - 1
    source = [np.append(start - 1, np.arange(begin, begin + n)) for begin, n in zip(begins, inputs, strict=True)]
    return PackedItem(
        **{**vars(item), "context": context},
        tokens=np.concatenate([context, *(ending[:-1] for ending in item.endings)]),
        positions=np.concatenate([np.arange(start), *(np.arange(start, start + n) for n in inputs)]),
        segments=np.repeat(np.arange(ENDINGS + 1), [start, *inputs]),
        source=np.concatenate(source),
        target=np.concatenate(item.endings),
        ending=np.repeat(np.arange(ENDINGS), [len(ending) for ending in item.endings]),
        truncated=len(context) < len(item.context),
    )


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens, and S scored tokens: `target[i]` is predicted at flat position `source[i]` of B*T.

    `slot` [S] is the row's ending, row * 4 + ending. `source` is sorted, so a chunk of head rows is a slice.
    """

    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    segments: Tensor  # [B, T]
    source: Tensor
    target: Tensor
    slot: Tensor


def plan(packed: Sequence[PackedItem], batch_tokens: int) -> list[np.ndarray]:
    """Indices into `packed` by batch: rows of one padded length, longest first, at most `batch_tokens` (or one row)."""
    widths = np.array([_padded(len(item.tokens)) for item in packed])
    batches: list[np.ndarray] = []
    for width in np.unique(widths)[::-1]:
        (alike,) = np.nonzero(widths == width)
        rows = max(1, batch_tokens // int(width))
        batches.extend(alike[first : first + rows] for first in range(0, len(alike), rows))
    return batches


def _padded(length: int) -> int:
    return math.ceil(length / LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def collate(items: Sequence[PackedItem], device: torch.device | str = "cpu") -> Batch:
    """Pad `items` into one batch on `device`."""
    width = _padded(max(len(item.tokens) for item in items))
    rows = np.zeros((3, len(items), width), dtype=np.int64)  # tokens, positions, segments
    rows[2] = PADDING
    for row, item in enumerate(items):
        rows[:, row, : len(item.tokens)] = item.tokens, item.positions, item.segments
    source = np.concatenate([item.source + row * width for row, item in enumerate(items)])
    target = np.concatenate([item.target for item in items])
    slot = np.concatenate([item.ending + row * ENDINGS for row, item in enumerate(items)])
    order = np.argsort(source, kind="stable")
    scored = np.stack([source[order], target[order], slot[order]])
    return Batch(*torch.from_numpy(rows).to(device), *torch.from_numpy(scored).to(device))


def block_mask(segments: Tensor) -> Tensor:
    """segments [B, T] -> [B, 1, T, T] bool: causal, and only into the context or the query's own segment.

    A padding position sees the context, earlier padding and itself, so its softmax is finite; nothing sees padding.
    """
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


def score(
    model: LanguageModel,
    packed: Sequence[PackedItem],
    batch_tokens: int,
    progress: Callable[[int], object] | None = None,
    name: str = "the model",
) -> pd.DataFrame:
    """The table of `protocols.answers` in the order of `packed`. No gradient, no random number, the model's mode kept.

    Args:
        batch_tokens: tokens in one forward pass, padding included.
        progress: called after each batch with the number of questions it held, e.g. `tqdm.update`.
        name: of the model, for the error message.

    Raises:
        UserError: a score is not a finite number; names the model and the question.
    """
    nats = np.zeros((len(packed), ENDINGS))
    with _scoring(model) as device:
        for indices in plan(packed, batch_tokens):
            batch = collate([packed[i] for i in indices], device)
            hidden = model.hidden(batch.tokens, batch.positions, block_mask(batch.segments))
            losses = _losses(model, hidden.flatten(0, 1), batch)
            sums = torch.zeros(len(indices) * ENDINGS, dtype=torch.float64, device=device)
            nats[indices] = sums.index_add_(0, batch.slot, losses.double()).view(-1, ENDINGS).cpu().numpy()
            if progress is not None:
                progress(len(indices))
    return answers(packed, _finite(nats, packed, name))


def _losses(model: LanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
    """hidden [B*T, D] -> -log p of each scored token [S], fp32."""
    parts = zip(batch.source.split(HEAD_ROWS), batch.target.split(HEAD_ROWS), strict=True)
    return torch.cat([token_nats(hidden[rows], model.head_weight, tokens, model.n_vocab) for rows, tokens in parts])


def score_plain(model: LanguageModel, packed: Sequence[PackedItem], name: str = "the model") -> pd.DataFrame:
    """The reference for `score`: one ending at a time after its context, no batch, no padding, no mask."""
    nats = np.zeros((len(packed), ENDINGS))
    with _scoring(model) as device:
        for row, item in enumerate(packed):
            for k, ending in enumerate(item.endings):
                tokens = torch.from_numpy(np.concatenate([item.context, ending[:-1]])).to(device)[None]
                hidden = model.hidden(tokens)[0, len(item.context) - 1 :]
                log_p = model.logits(hidden).float().log_softmax(-1)
                nats[row, k] = -log_p.gather(1, torch.from_numpy(ending).to(device)[:, None]).double().sum().item()
    return answers(packed, _finite(nats, packed, name))


def hellaswag_accuracy(model: LanguageModel, packed: Sequence[PackedItem], batch_tokens: int) -> dict[str, float]:
    """acc_norm, acc and gold_bpb (bits per byte of the true endings): what a training logs as it goes."""
    return accuracy(score(model, packed, batch_tokens))


def accuracy(answered: pd.DataFrame) -> dict[str, float]:
    """acc_norm, acc and gold_bpb of a table that `score` made."""
    bits = float(answered["gold_nats"].sum()) / math.log(2)
    return {
        "acc_norm": float(answered["correct_norm"].mean()),
        "acc": float(answered["correct"].mean()),
        "gold_bpb": bits / float(answered["gold_bytes"].sum()),
    }


@contextmanager
def _scoring(model: LanguageModel) -> Iterator[torch.device]:
    """Inference mode and evaluation mode; afterwards each module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield next(iter(model.parameters())).device
    finally:
        for module, training in modes:
            module.training = training


def _finite(nats: np.ndarray, packed: Sequence[EncodedItem], name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(nats).all(axis=1))
    if len(bad):
        raise UserError(
            f"{name} gives HellaSwag question {packed[bad[0]].index} a score that is not a finite number: its weights "
            f"are broken or overflow; set runtime.dtype: float32 in params.yaml, or make the model again"
        )
    return nats
