"""Three ways to the same scores: `tree` and `cached` read a context once for all its endings, `plain` once for each.

tree: a question is one row [ctx | e1[:-1] | e2[:-1] | ...]. Positions restart after ctx, and a block mask lets an
ending see ctx and itself, so that each is scored as if it stood alone after ctx; the model takes positions and a mask.
cached: keys and values of a context are kept, and its endings go on from them: the model need be causal and no more.
plain: the reference, one ending at a time after all that stands before it, no batch, no padding, no mask.

What is summed over an ending's tokens is its `Measure`: nats, or the tokens that are not the likeliest.

All batches are planned, then `deal` says which of them are scored here: what a batch holds, and with it the last digit
of every score, does not depend on how many processes share the batches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from microlm.evaluation.scoring.encoding import Encoded
from microlm.models.interface import LanguageModel, Prefix
from microlm.objective.fused_head import token_nats

HEAD_ROWS = 4096  # positions in one pass of the head
HEAD_LOGITS = 2**25  # logits in one pass where they are made whole: 128 MiB in float32
LENGTH_MULTIPLE = 8  # rows are padded to it, so that a model meets few shapes, of edges that its kernels like
SLACK = 32  # no row is padded by as much: a small set is cut into more batches instead
PADDING = -1  # its segment number; 0 is the context, 1, 2, ... the endings

Nats = Iterator[tuple[Sequence[int], list[np.ndarray]]]
"""Indices of some questions, float64 [endings] of each of these."""
Deal = Callable[[list[np.ndarray]], Sequence[np.ndarray]]
"""Batches (indices of their questions) -> those that this process scores."""
Rows = list[np.ndarray]
"""Of each ending of a batch, question by question: at which rows of the hidden states its tokens are predicted."""
Measure = Callable[[LanguageModel, Tensor, Tensor, Tensor], Tensor]
"""(model, hidden [N, D], source [S], target [S]) -> float64 [S], one number for each scored token."""


def nats_by(
    backend: str,
    model: LanguageModel,
    questions: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray,
    deal: Deal = list,
    measure: Measure | None = None,
) -> Nats:
    """Read `prefix`, int64 [P], before every question (P may be 0). Called in inference and evaluation mode."""
    if backend == "plain":
        yield from _plain(model, questions, prefix, deal, measure or _plain_nats)
        return
    planned, read = {"tree": (plan, _tree), "cached": (plan_alike, _cached)}[backend]
    shared = model.read_prefix(torch.from_numpy(prefix).to(model.head_weight.device)) if len(prefix) else None
    for indices in deal(planned(questions, batch_tokens)):
        chosen = [questions[i] for i in indices]
        hidden, rows = read(model, chosen, shared)
        endings = [ending for question in chosen for ending in question.endings]
        slots = np.repeat(np.arange(len(endings)), [len(ending) for ending in endings])
        tokens = np.stack([np.concatenate(rows), np.concatenate(endings), slots])
        source, target, slot = torch.from_numpy(tokens).to(hidden.device)
        found = (measure or scored_nats)(model, hidden, source, target)
        sums = torch.zeros(len(endings), dtype=torch.float64, device=found.device).index_add_(0, slot, found)
        counts = [len(question.endings) for question in chosen]
        yield indices, np.split(sums.cpu().numpy(), np.cumsum(counts)[:-1])


def _plain(
    model: LanguageModel, questions: Sequence[Encoded], prefix: np.ndarray, deal: Deal, measure: Measure
) -> Nats:
    for indices in deal(list(np.arange(len(questions))[:, None])):
        question = questions[indices[0]]
        before = np.concatenate([prefix, question.context])
        nats = np.zeros(len(question.endings))
        for k, ending in enumerate(question.endings):
            tokens = torch.from_numpy(np.concatenate([before, ending[:-1]])).to(model.head_weight.device)
            hidden = model.hidden(tokens[None])[0, len(before) - 1 :]
            targets = torch.from_numpy(ending).to(hidden.device)
            nats[k] = measure(model, hidden, torch.arange(len(targets), device=hidden.device), targets).sum().item()
        yield indices, [nats]


def _tree(model: LanguageModel, questions: Sequence[Encoded], prefix: Prefix | None) -> tuple[Tensor, Rows]:
    before = prefix.length if prefix else 0
    cells, rows = collate(questions, before)
    tokens, positions, segments = cells.to(model.head_weight.device)
    return model.hidden(tokens, positions, block_mask(segments, before), prefix).flatten(0, 1), rows


def _cached(model: LanguageModel, questions: Sequence[Encoded], prefix: Prefix | None) -> tuple[Tensor, Rows]:
    """Contexts of one length [G, n], unpadded; endings [G * k, width] padded on the right, where nothing looks."""
    device = model.head_weight.device
    endings = [ending for question in questions for ending in question.endings]
    each, width = len(questions[0].endings), max(map(len, endings)) - 1
    tokens, rows = np.zeros((len(endings), width), dtype=np.int64), []
    for slot, ending in enumerate(endings):
        tokens[slot, : len(ending) - 1] = ending[:-1]
        begin = len(questions) + slot * width  # behind the last position of each context
        rows.append(np.append(slot // each, np.arange(begin, begin + len(ending) - 1)))
    past = model.read_prefix(torch.from_numpy(np.stack([q.context for q in questions])).to(device), prefix)
    hidden = past.last
    if width:
        later = model.hidden(torch.from_numpy(tokens).to(device), prefix=past)
        hidden = torch.cat((hidden, later.flatten(0, 1)))
    return hidden, rows


def plan(questions: Sequence[Encoded], batch_tokens: int) -> list[np.ndarray]:
    """Indices by batch: rows of about one length, longest first, at most `batch_tokens` or one row."""
    lengths = np.array([row_length(question) for question in questions])
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    while len(order):
        width = padded(lengths[order[0]])
        alike = order[: max(1, batch_tokens // int(width))]
        batches.append(alike[lengths[alike] > width - SLACK])
        order = order[len(batches[-1]) :]
    return batches


def plan_alike(questions: Sequence[Encoded], batch_tokens: int) -> list[np.ndarray]:
    """Batches of questions with as many tokens of context and as many endings, longest first."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[len(question.context), len(question.endings)].append(index)
    batches = []
    for (length, endings), members in sorted(groups.items(), reverse=True):
        longest = max(questions[index].lengths.max() for index in members)
        rows = max(1, batch_tokens // max(length, endings * (longest - 1)))
        batches += [np.array(members[first : first + rows]) for first in range(0, len(members), rows)]
    return batches


def row_length(question: Encoded) -> int:
    """Tokens that the question's row takes."""
    return len(question.context) + int((question.lengths - 1).sum())


def padded(lengths: ArrayLike) -> np.ndarray:
    """`lengths` rounded up to whole multiples of LENGTH_MULTIPLE."""
    return -(-np.asarray(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def collate(questions: Sequence[Encoded], before: int = 0) -> tuple[Tensor, Rows]:
    """B rows padded to T tokens: int64 [3, B, T] with tokens, positions and segments; and which of B*T rows count.

    Positions count from `before`, the tokens of a prefix that all rows go on from.
    """
    width = int(padded(max(map(row_length, questions))))
    cells = np.zeros((3, len(questions), width), dtype=np.int64)
    cells[2] = PADDING
    rows = []
    for index, question in enumerate(questions):
        start, inputs = len(question.context), question.lengths - 1
        row = cells[:, index, : row_length(question)]
        row[0] = np.concatenate([question.context, *(ending[:-1] for ending in question.endings)])
        row[1] = before + np.concatenate([np.arange(start), *(np.arange(start, start + n) for n in inputs)])
        row[2] = np.repeat(np.arange(len(inputs) + 1), [start, *inputs])
        # the first token of an ending is predicted at the context's end, token j at the ending's own token j - 1
        begins = index * width + start + np.cumsum([0, *inputs[:-1]])
        last = index * width + start - 1
        rows += [np.append(last, np.arange(begin, begin + n)) for begin, n in zip(begins, inputs)]
    return torch.from_numpy(cells), rows


def block_mask(segments: Tensor, before: int = 0) -> Tensor:
    """segments [B, T] -> [B, 1, T, before + T] bool: causal, and only into prefix, context or the query's own segment.

    A padding position sees the context, earlier padding and itself, so its softmax is finite; nothing sees padding.
    """
    rows, width = segments.shape
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    own = causal & ((key == 0) | (key == query))
    return torch.cat((own.new_ones(rows, width, before), own), dim=2)[:, None]


def scored_nats(model: LanguageModel, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """hidden [N, D] -> -log p of token target[i] at row source[i], float64 [S]; sums over the vocabulary are float32.

    The head runs once for each distinct row. Logits are made whole only where a row has several targets, as the end of
    a context has, and where the head is more than its matrix.
    """
    _, which, count = source.unique(return_inverse=True, return_counts=True)
    alone = (count[which] == 1) & model.plain_head
    nats = torch.empty(len(source), dtype=torch.float64, device=hidden.device)
    for of, chosen in ((_nats_alone, alone), (_nats_from_logits, ~alone)):
        if chosen.any():
            nats[chosen] = of(model, hidden, source[chosen], target[chosen])
    return nats


def _plain_nats(model: LanguageModel, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`scored_nats` in one step, the reference."""
    return -model.logits(hidden[source]).float().log_softmax(-1).gather(1, target[:, None])[:, 0].double()


def missed(model: LanguageModel, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """1 for each token that is not the likeliest, else 0: an ending of sum 0 is what greedy decoding would write."""
    height = max(1, HEAD_LOGITS // model.n_vocab)
    likeliest = [model.logits(hidden[rows]).argmax(-1) for rows in source.split(height)]
    return (torch.cat(likeliest) != target).double()


def _nats_alone(model: LanguageModel, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    weight = model.head_weight[: model.n_vocab].to(hidden.dtype)  # once for all parts
    parts = zip(source.split(HEAD_ROWS), target.split(HEAD_ROWS))
    return torch.cat([token_nats(hidden[rows], weight, ids, model.n_vocab).double() for rows, ids in parts])


def _nats_from_logits(model: LanguageModel, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    rows, which = source.unique(return_inverse=True)
    nats = torch.empty(len(source), dtype=torch.float64, device=hidden.device)
    height = min(HEAD_ROWS, max(1, HEAD_LOGITS // model.n_vocab))
    for first, part in zip(range(0, len(rows), height), rows.split(height)):
        z = model.logits(hidden[part]).float()
        (mine,) = torch.where((which >= first) & (which < first + height))
        at = which[mine] - first
        nats[mine] = (z.logsumexp(-1)[at] - z[at, target[mine]]).double()
    return nats
