"""Three ways to the same scores: `tree` and `cached` read a context once for all its endings, `plain` once for each.

Each is a generator of (indices of some questions, nats of the endings of each of these), and reads `prefix`, int64 [P],
before every question (P may be 0). It is called in inference mode, the model in evaluation mode.

What is summed over an ending's tokens is its `Measure`: nats, or the tokens that are not the likeliest.

All batches are planned, then `deal` says which of them are scored here: what a batch holds, and with it the last digit
of every score, does not depend on how many processes share the batches.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from microlm.evaluation.scoring.encoding import Encoded
from microlm.evaluation.scoring.layout import (
    block_mask,
    collate,
    collate_endings,
    lay_out,
    plan,
    plan_alike,
    row_length,
)
from microlm.models.interface import LanguageModel, Prefix
from microlm.objective.fused_head import token_nats

HEAD_ROWS = 4096  # positions in one pass of the head
HEAD_LOGITS = 2**25  # logits in one pass where they are made whole: 128 MiB in float32

Nats = Iterator[tuple[np.ndarray, list[np.ndarray]]]
Deal = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""Batches (indices of their questions) -> those that this process scores."""
Measure = Callable[[LanguageModel, Tensor, Tensor, Tensor], Tensor]
"""(model, hidden [N, D], source [S], target [S]) -> float64 [S], one number for each scored token."""


def every(batches: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return batches


def tree(
    model: LanguageModel,
    questions: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray,
    deal: Deal = every,
    measure: Measure | None = None,
) -> Nats:
    """One row a question, all endings behind one context (see layout.py): the model takes positions and a mask."""
    shared = _read(model, prefix)
    for indices in deal(plan([row_length(question) for question in questions], batch_tokens)):
        chosen = [questions[i] for i in indices]
        batch = collate([lay_out(question, len(prefix)) for question in chosen], model.head_weight.device)
        hidden = model.hidden(batch.tokens, batch.positions, block_mask(batch.segments, len(prefix)), shared)
        found = (measure or scored_nats)(model, hidden.flatten(0, 1), batch.source, batch.target)
        yield indices, _by_question(found, batch.slot, chosen)


def cached(
    model: LanguageModel,
    questions: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray,
    deal: Deal = every,
    measure: Measure | None = None,
) -> Nats:
    """Keys and values of a context are kept, and its endings go on from them: the model need be causal and no more.

    Contexts of one length are read together, unpadded; endings are padded on the right, where nothing looks.
    """
    shared = _read(model, prefix)
    for indices in deal(list(plan_alike(questions, batch_tokens))):
        chosen = [questions[i] for i in indices]
        batch = collate_endings(chosen, model.head_weight.device)
        past = model.read_prefix(batch.contexts, shared)
        hidden = past.last
        if batch.tokens.numel():
            hidden = torch.cat((hidden, model.hidden(batch.tokens, prefix=past).flatten(0, 1)))
        found = (measure or scored_nats)(model, hidden, batch.source, batch.target)
        yield indices, _by_question(found, batch.slot, chosen)


def plain(
    model: LanguageModel,
    questions: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray,
    deal: Deal = every,
    measure: Measure | None = None,
) -> Nats:
    """The reference: one ending at a time after all that stands before it, no batch, no padding, no mask."""
    for indices in deal(np.arange(len(questions))[:, None]):
        question = questions[indices[0]]
        before = np.concatenate([prefix, question.context])
        nats = np.zeros(len(question.endings))
        for k, ending in enumerate(question.endings):
            tokens = torch.from_numpy(np.concatenate([before, ending[:-1]])).to(model.head_weight.device)
            hidden = model.hidden(tokens[None])[0, len(before) - 1 :]
            targets = torch.from_numpy(ending).to(hidden.device)
            rows = torch.arange(len(targets), device=hidden.device)
            nats[k] = (measure or _plain_nats)(model, hidden, rows, targets).sum().item()
        yield indices, [nats]


BACKENDS: dict[str, Callable[..., Nats]] = {
    "tree": tree,
    "cached": cached,
    "plain": plain,
}


def _read(model: LanguageModel, prefix: np.ndarray) -> Prefix | None:
    return model.read_prefix(torch.from_numpy(prefix).to(model.head_weight.device)) if len(prefix) else None


def _by_question(nats: Tensor, slot: Tensor, questions: Sequence[Encoded]) -> list[np.ndarray]:
    """Measures [S] of scored tokens, summed by ending: float64 [endings] of each question."""
    counts = [len(question.endings) for question in questions]
    sums = torch.zeros(sum(counts), dtype=torch.float64, device=nats.device).index_add_(0, slot, nats)
    return np.split(sums.cpu().numpy(), np.cumsum(counts)[:-1])


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
