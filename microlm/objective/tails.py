"""The distillation term of N rows under each treatment of the tail: its value and its slopes on the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.capped_tail import solve, solve_by_sweeps
from microlm.objective.definition import Objective, SparseTeacher
from microlm.objective.dense_tail import DenseSlope, DenseTail, tail_moments
from microlm.objective.divergences import LARGEST_LOG_RATIO, Divergence
from microlm.objective.table_tail import scale_to_mass
from microlm.objective.vocabulary_blocks import AnyEntries, VocabularyBlocks


@dataclass
class RowStatistics:
    """What the first sweep leaves of each row."""

    log_normalizer: Tensor  # [N] logsumexp over the vocabulary
    gold: Tensor  # [N] logit of the target
    head: Tensor | None = None  # [N, k] logits of the cached ids
    log_tail: Tensor | None = None  # [N] logsumexp of z / T over all other ids
    largest: Tensor | None = None  # [N, G] the largest z / T of them in each group; for tail: capped


@dataclass
class TokenSlopes:
    """Slopes on the logits of single tokens; all [M]."""

    rows: Tensor
    ids: Tensor
    slope: Tensor
    log_q: Tensor  # at temperature 1


@dataclass
class DistillationTerm:
    """The distillation term of N rows and its slopes, times its weight."""

    total: Tensor  # nats, not weighted
    head_slope: Tensor  # [N, k] on the logits of the cached ids
    tail_slope: Tensor | None = None  # [N] on the tail's logsumexp of z / T, for all other ids but `single`
    single: TokenSlopes | None = None
    dense: DenseSlope | None = None  # in place of both


def _lumped(
    _: VocabularyBlocks,
    rows: RowStatistics,
    teacher: SparseTeacher,
    __: AnyEntries,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    with torch.enable_grad():
        head = rows.head.detach().requires_grad_()
        log_tail = rows.log_tail.detach().requires_grad_()
        symbols = torch.cat((head / objective.temperature, log_tail[:, None]), dim=-1)
        log_q = symbols - symbols.logsumexp(-1, keepdim=True)
        total = objective.divergence(teacher.log_p.to(log_q.dtype), log_q).sum()
        slopes = torch.autograd.grad(weight * total, (head, log_tail))
    return DistillationTerm(total.detach(), *slopes)


def _capped(
    blocks: VocabularyBlocks,
    rows: RowStatistics,
    teacher: SparseTeacher,
    cached: AnyEntries,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    divergence, scale = objective.divergence, 1 / objective.temperature
    log_p, head = teacher.log_p.to(blocks.exact), rows.head * scale
    log_normalizer = torch.logaddexp(head.logsumexp(-1), rows.log_tail)
    if blocks.whole_passes:
        found = solve_by_sweeps(blocks, cached, log_p, log_normalizer, rows.log_tail, scale)
        return _dense(blocks, rows, log_p, log_normalizer, cached, DenseTail("capped", *found), objective, weight)
    tail = solve(blocks, teacher.ids, log_p, log_normalizer, rows.log_tail, rows.largest, scale)
    capped, log_q = tail.capped, tail.capped.log_q
    q, log_tau = log_q.exp(), tail.log_tau[capped.rows]
    capped_slope, tail_slope = divergence.slope(log_tau - log_q), divergence.slope(tail.log_c)
    evenly = divergence.term(tail.log_c, torch.zeros_like(tail.log_c))  # phi / q where the cap does not reach
    value = tail.uncapped_mass * evenly + capped.sum(divergence.term(log_tau, log_q), len(head))
    slope = tail.uncapped_mass * tail_slope + capped.sum(q * capped_slope, len(head))
    term, center = _with_tail(head - log_normalizer[:, None], log_p, value, slope, divergence, weight * scale)
    term.tail_slope = weight * (tail_slope - center) * (rows.log_tail - log_normalizer).exp()
    plain = (log_q + log_normalizer[capped.rows]) / scale - rows.log_normalizer[capped.rows]
    single = weight * scale * q * (capped_slope - center[capped.rows])
    term.single = TokenSlopes(capped.rows, capped.ids, single, plain)
    return term


def _tabled(
    blocks: VocabularyBlocks,
    rows: RowStatistics,
    teacher: SparseTeacher,
    cached: AnyEntries,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    if teacher.log_table is None:
        raise ValueError("tail: table needs a teacher with a table")
    scale = 1 / objective.temperature
    log_p, head = teacher.log_p.to(blocks.exact), rows.head * scale
    log_normalizer = torch.logaddexp(head.logsumexp(-1), rows.log_tail)
    log_table = teacher.log_table.to(blocks.exact)
    tail = DenseTail("table", scale_to_mass(log_p, teacher.ids, log_table), log_table)
    return _dense(blocks, rows, log_p, log_normalizer, cached, tail, objective, weight)


def _dense(
    blocks: VocabularyBlocks,
    rows: RowStatistics,
    log_p: Tensor,
    log_normalizer: Tensor,
    cached: AnyEntries,
    tail: DenseTail,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    """A tail whose tokens each have a slope of their own: one more sweep for its sums."""
    divergence, scale = objective.divergence, 1 / objective.temperature
    parameter = torch.full((), divergence.parameter, dtype=log_p.dtype, device=log_p.device)
    value, slope = tail_moments(blocks, cached, tail, log_normalizer, divergence, parameter, scale)
    head = rows.head * scale - log_normalizer[:, None]
    term, center = _with_tail(head, log_p, value, slope, divergence, weight * scale)
    term.dense = DenseSlope(divergence, parameter, weight * scale, tail, center, log_normalizer)
    return term


def _with_tail(
    log_q: Tensor, log_p: Tensor, value: Tensor, slope: Tensor, divergence: Divergence, weight: float
) -> tuple[DistillationTerm, Tensor]:
    """Head [N, k] and tail, whose sums of phi and of q d phi / d q are `value` and `slope` [N], put together.

    Returns:
        The term with its head alone, and the mean of d phi / d q under the student, [N].
    """
    head_slope = divergence.slope((log_p[:, :-1] - log_q).clamp_max(LARGEST_LOG_RATIO))
    center = (log_q.exp() * head_slope).sum(-1) + slope
    total = divergence.term(log_p[:, :-1], log_q).sum() + value.sum()
    return DistillationTerm(total, weight * log_q.exp() * (head_slope - center[:, None])), center


TAILS = {"lumped": _lumped, "capped": _capped, "table": _tabled}
