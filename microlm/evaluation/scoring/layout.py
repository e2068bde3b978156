"""Questions as rows of a batch for tree attention.

A question is one row [ctx | e1[:-1] | e2[:-1] | ...]. Positions restart after ctx, and a block mask lets an ending see
ctx and itself, so that each ending is scored as if it stood alone after ctx. A prefix that all rows go on from stands
before them in the mask's columns, not in the rows.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from microlm.evaluation.scoring.encoding import Encoded

LENGTH_MULTIPLE = 8  # rows are padded to it, so that a model meets few shapes, of edges that its kernels like
SLACK = 32  # no row is padded by as much: a small set is cut into more batches instead
PADDING = -1  # its segment number; 0 is the context, 1, 2, ... the endings


@dataclass(frozen=True)
class Row:
    """A question of N tokens (int64 arrays).

    `source` [S] is the position in the row whose hidden state predicts `target` [S], a token of ending `ending` [S].
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    source: np.ndarray
    target: np.ndarray
    ending: np.ndarray


def row_length(question: Encoded) -> int:
    """N, the tokens that the question's row takes."""
    return len(question.context) + sum(len(ending) - 1 for ending in question.endings)


def lay_out(question: Encoded, before: int = 0) -> Row:
    """The question's row; its positions count from `before`, the tokens of the prefix."""
    start = len(question.context)
    inputs = [len(ending) - 1 for ending in question.endings]
    begins = start + np.cumsum([0, *inputs[:-1]])
    # the first token of an ending is predicted at the context's end, token j at the ending's own token j - 1
    source = [np.append(start - 1, np.arange(begin, begin + n)) for begin, n in zip(begins, inputs)]
    return Row(
        tokens=np.concatenate([question.context, *(ending[:-1] for ending in question.endings)]),
        positions=before + np.concatenate([np.arange(start), *(np.arange(start, start + n) for n in inputs)]),
        segments=np.repeat(np.arange(len(inputs) + 1), [start, *inputs]),
        source=np.concatenate(source),
        target=np.concatenate(question.endings),
        ending=np.repeat(np.arange(len(inputs)), [len(ending) for ending in question.endings]),
    )


def plan(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Indices into `lengths` by batch: rows of about one length, longest first, at most `batch_tokens` or one row."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    while len(order):
        width = padded(lengths[order[0]])
        alike = order[: max(1, batch_tokens // int(width))]
        batches.append(alike[lengths[alike] > width - SLACK])
        order = order[len(batches[-1]) :]
    return batches


def padded(lengths: ArrayLike) -> np.ndarray:
    """`lengths` rounded up to whole multiples of LENGTH_MULTIPLE."""
    return -(-np.asarray(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens, and S scored tokens: `target[i]` is predicted at flat position `source[i]` of B*T.

    `slot` [S] counts the endings of the batch through, row by row.
    """

    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    segments: Tensor  # [B, T]
    source: Tensor
    target: Tensor
    slot: Tensor


def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """Pad `rows` into one batch on `device`."""
    width = int(padded(max(len(row.tokens) for row in rows)))
    cells = np.zeros((3, len(rows), width), dtype=np.int64)  # tokens, positions, segments
    cells[2] = PADDING
    for index, row in enumerate(rows):
        cells[:, index, : len(row.tokens)] = row.tokens, row.positions, row.segments
    slots = np.cumsum([0, *(row.ending[-1] + 1 for row in rows)])
    scored = np.concatenate(
        [
            np.stack([row.source + index * width, row.target, row.ending + slots[index]])
            for index, row in enumerate(rows)
        ],
        axis=1,
    )
    return Batch(*torch.from_numpy(cells).to(device), *torch.from_numpy(scored).to(device))


def plan_alike(questions: Sequence[Encoded], batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of questions with as many tokens of context and as many endings, longest first."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[len(question.context), len(question.endings)].append(index)
    for (length, endings), members in sorted(groups.items(), reverse=True):
        longest = max(len(ending) for index in members for ending in questions[index].endings)
        rows = max(1, batch_tokens // max(length, endings * (longest - 1)))
        yield from (np.array(members[first : first + rows]) for first in range(0, len(members), rows))


@dataclass(frozen=True)
class Endings:
    """The k endings of each of G questions, as rows that go on from their contexts.

    `target` and `slot` are as in `Batch`; `source` counts G last positions of the contexts, then those of `tokens`.
    """

    contexts: Tensor  # [G, n]
    tokens: Tensor  # [G * k, width], padded on the right, where nothing looks; width may be 0
    source: Tensor
    target: Tensor
    slot: Tensor


def collate_endings(questions: Sequence[Encoded], device: torch.device | str = "cpu") -> Endings:
    """Contexts and endings of questions that `plan_alike` put together."""
    endings = [ending for question in questions for ending in question.endings]
    each, width = len(questions[0].endings), max(len(ending) for ending in endings) - 1
    tokens = np.zeros((len(endings), width), dtype=np.int64)
    source = []
    for slot, ending in enumerate(endings):
        tokens[slot, : len(ending) - 1] = ending[:-1]
        begin = len(questions) + slot * width
        source.append(np.append(slot // each, np.arange(begin, begin + len(ending) - 1)))
    slots = np.repeat(np.arange(len(endings)), [len(ending) for ending in endings])
    arrays = (np.stack([question.context for question in questions]), tokens)
    scored = np.stack([np.concatenate(source), np.concatenate(endings), slots])
    return Endings(*(torch.from_numpy(array).to(device) for array in (*arrays, *scored)))


def block_mask(segments: Tensor, before: int = 0) -> Tensor:
    """segments [B, T] -> [B, 1, T, before + T] bool: causal, and only into prefix, context or the query's own segment.

    A padding position sees the context, earlier padding and itself, so its softmax is finite; nothing sees padding.
    """
    rows, width = segments.shape
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    own = causal & ((key == 0) | (key == query))
    return torch.cat((own.new_ones(rows, width, before), own), dim=2)[:, None]
