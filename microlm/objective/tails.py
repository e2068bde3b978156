"""The distillation term of N rows under each treatment of the tail: its value and its slopes on the logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microlm.objective.capped_tail import LARGEST_LOG_RATIO, solve, write_capped_gradient
from microlm.objective.definition import Objective, SparseTeacher
from microlm.objective.divergences import Divergence
from microlm.objective.table_tail import scale_to_mass, tail_moments, write_table_gradient
from microlm.objective.vocabulary_blocks import Entries, VocabularyBlocks


@dataclass
class RowStatistics:
    """What the first sweep leaves of each row."""

    log_normalizer: Tensor  # [N] logsumexp over the vocabulary
    gold: Tensor  # [N] logit of the target
    head: Tensor | None = None  # [N, k] logits of the cached ids
    log_tail: Tensor | None = None  # [N] logsumexp of z / T over all other ids
    largest: Tensor | None = None  # [N] the largest z / T of them


@dataclass
class DistillationTerm:
    """The distillation term of N rows and its slopes, times its weight."""

    total: Tensor  # nats, not weighted
    head_slope: Tensor  # [N, k] on the logits of the cached ids
    tail_slope: Tensor | None = None  # lumped: [N] on the tail's logsumexp of z / T
    # capped and table:
    log_c: Tensor | None = None  # [N]
    cap: Tensor | None = None  # capped: [N] log of the largest p; table: [V] its logarithm
    center: Tensor | None = None  # [N] the mean of d phi / d q under the student
    log_normalizer: Tensor | None = None  # [N] of z / T


def _lumped(
    _: VocabularyBlocks, rows: RowStatistics, teacher: SparseTeacher, __: Entries, objective: Objective, weight: float
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
    _: Entries,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    divergence, scale = objective.divergence, 1 / objective.temperature
    log_p, head = teacher.log_p.to(blocks.exact), rows.head * scale
    log_normalizer = torch.logaddexp(head.logsumexp(-1), rows.log_tail)
    tail = solve(blocks, teacher.ids, log_p, log_normalizer, rows.log_tail, rows.largest, divergence, scale)
    evenly = divergence.term(tail.log_c, torch.zeros_like(tail.log_c))  # phi / q where the cap does not reach
    value = tail.uncapped_mass * evenly + tail.value
    slope = tail.uncapped_mass * divergence.slope(tail.log_c) + tail.slope
    made = _with_tail(head - log_normalizer[:, None], log_p, value, slope, divergence, weight * scale)
    return replace(made, log_c=tail.log_c, cap=tail.log_tau, log_normalizer=log_normalizer)


def _tabled(
    blocks: VocabularyBlocks,
    rows: RowStatistics,
    teacher: SparseTeacher,
    cached: Entries,
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    if teacher.log_table is None:
        raise ValueError("tail: table needs a teacher with a table")
    divergence, scale = objective.divergence, 1 / objective.temperature
    log_p, head = teacher.log_p.to(blocks.exact), rows.head * scale
    log_normalizer = torch.logaddexp(head.logsumexp(-1), rows.log_tail)
    log_table = teacher.log_table.to(blocks.exact)
    log_c = scale_to_mass(log_p, teacher.ids, log_table)
    value, slope = tail_moments(blocks, cached, log_c, log_table, log_normalizer, divergence, scale)
    made = _with_tail(head - log_normalizer[:, None], log_p, value, slope, divergence, weight * scale)
    return replace(made, log_c=log_c, cap=log_table, log_normalizer=log_normalizer)


def _with_tail(
    log_q: Tensor, log_p: Tensor, value: Tensor, slope: Tensor, divergence: Divergence, weight: float
) -> DistillationTerm:
    """Head [N, k] and tail, whose sums of phi and of q d phi / d q are `value` and `slope` [N], put together."""
    head_slope = divergence.slope((log_p[:, :-1] - log_q).clamp_max(LARGEST_LOG_RATIO))
    center = (log_q.exp() * head_slope).sum(-1) + slope
    total = divergence.term(log_p[:, :-1], log_q).sum() + value.sum()
    return DistillationTerm(total, weight * log_q.exp() * (head_slope - center[:, None]), center=center)


TREATMENTS = {"lumped": _lumped, "capped": _capped, "table": _tabled}
WRITERS = {"capped": write_capped_gradient, "table": write_table_gradient}
