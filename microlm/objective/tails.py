"""The distillation term of N rows under each treatment of the tail: its value and its slopes on the logits.

    lumped   the tail is one symbol. A row is k + 1 numbers, and autograd differentiates the divergence of these
    capped   p_j = min(tau, c q_j), the nearest of all teachers that the record allows (capped_tail.py)
    table    p_j = c u_j on the tail, u_j = mean over positions of p_j, c so that they sum to the tail's mass

A student puts mass where the teacher's tail is, and reverse KL weighs the teacher's log-probabilities there by the
student's. The table, one of the vocabulary, the same at every position and so free of bytes per token, holds how the
tail's mass is spread. The mean over all positions is the better table: that over positions where j is outside the top k
knows less of the tokens that are frequent somewhere, and these are where a student has its mass. Unlike the lumped and
the capped tail this is an estimate and no bound. `python -m stages.probe` measures its error.

A tabled tail gives every token a probability of its own, so that its sums and slopes take whole passes over the logits;
a capped one too where whole passes cost least, and elsewhere it looks at single tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from microlm.objective.capped_tail import Tokens, solve, solve_by_sweeps
from microlm.objective.divergences import FORMULAS, LARGEST_LOG_RATIO, Divergence, Formula, SparseTeacher
from microlm.objective.schedule import Objective
from microlm.objective.vocabulary_blocks import StudentRows, kernel


@dataclass
class DistillationTerm:
    """The distillation term of N rows and its slopes, times its weight."""

    total: Tensor  # nats, not weighted
    head_slope: Tensor  # [N, k] on the logits of the cached ids
    tail_slope: Tensor | None = None  # [N] on the tail's logsumexp of z / T, for all other ids but those capped
    capped: Tokens | None = None  # log q at temperature 1
    capped_slope: Tensor | None = None  # [M] on their logits
    # in place of all slopes on the tail: (part, z, weight) turns a block z into weight softmax(z) + slopes, in place
    write_dense: Callable[[slice, Tensor, Tensor], None] | None = None


def _lumped(student: StudentRows, teacher: SparseTeacher, objective: Objective, weight: float) -> DistillationTerm:
    with torch.enable_grad():
        head = student.head.detach().requires_grad_()
        log_tail = student.log_tail.detach().requires_grad_()
        symbols = torch.cat((head / objective.temperature, log_tail[:, None]), dim=-1)
        log_q = symbols - symbols.logsumexp(-1, keepdim=True)
        total = objective.divergence(teacher.log_p.to(log_q.dtype), log_q).sum()
        slopes = torch.autograd.grad(weight * total, (head, log_tail))
    return DistillationTerm(total.detach(), *slopes)


def _capped(student: StudentRows, teacher: SparseTeacher, objective: Objective, weight: float) -> DistillationTerm:
    log_p = teacher.log_p.to(student.blocks.exact)
    found = None if student.blocks.layout.whole_passes else solve(student, log_p)
    if found is None:
        log_c, log_tau = solve_by_sweeps(student, log_p)
        return _dense(student, log_p, _log_ratio_capped, log_c, lambda _: log_tau, objective, weight)
    divergence, log_normalizer = objective.divergence, student.tempered_normalizer
    capped, log_c, log_tau = found.capped, found.log_c, found.log_tau[found.capped.rows]
    q = capped.log_q.exp()
    capped_slope, tail_slope = divergence.slope(log_tau - capped.log_q), divergence.slope(log_c)
    evenly = divergence.term(log_c, torch.zeros_like(log_c))  # phi / q where the cap does not reach
    value = found.uncapped_mass * evenly + capped.sum(divergence.term(log_tau, capped.log_q), len(log_c))
    slope = found.uncapped_mass * tail_slope + capped.sum(q * capped_slope, len(log_c))
    term, center = _with_tail(student, log_p, value, slope, divergence, weight)
    term.tail_slope = weight * (tail_slope - center) * (student.log_tail - log_normalizer).exp()
    plain = (capped.log_q + log_normalizer[capped.rows]) / student.scale - student.log_normalizer[capped.rows]
    term.capped = capped._replace(log_q=plain)
    term.capped_slope = weight * student.scale * q * (capped_slope - center[capped.rows])
    return term


def _tabled(student: StudentRows, teacher: SparseTeacher, objective: Objective, weight: float) -> DistillationTerm:
    if teacher.log_table is None:
        raise ValueError("tail: table needs a teacher with a table")
    log_p, log_table = (said.to(student.blocks.exact) for said in (teacher.log_p, teacher.log_table))
    log_c = scale_to_mass(log_p, teacher.ids, log_table)
    return _dense(student, log_p, _log_ratio_tabled, log_c, log_table.__getitem__, objective, weight)


TAILS = {"lumped": _lumped, "capped": _capped, "table": _tabled}


def scale_to_mass(log_p: Tensor, ids: Tensor, log_table: Tensor) -> Tensor:
    """log c of a tabled tail, [...], of the cache's log_p [..., k + 1] and ids [..., k], and the table [V]."""
    table = log_table.double().exp()
    tail = (table.sum() - table[ids].sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    return (log_p[..., -1].double() - tail.log()).to(log_p.dtype)


def _with_tail(
    student: StudentRows, log_p: Tensor, value: Tensor, slope: Tensor, divergence: Divergence, weight: float
) -> tuple[DistillationTerm, Tensor]:
    """Head and tail put together; the tail's sums of phi and of q d phi / d q are `value` and `slope` [N].

    Returns:
        The term with its head alone, and the mean of d phi / d q under the student, [N].
    """
    log_p, log_q = log_p[:, :-1], student.head * student.scale - student.tempered_normalizer[:, None]
    head_slope = divergence.slope((log_p - log_q).clamp_max(LARGEST_LOG_RATIO))
    center = (log_q.exp() * head_slope).sum(-1) + slope
    total = divergence.term(log_p, log_q).sum() + value.sum()
    return DistillationTerm(total, weight * student.scale * log_q.exp() * (head_slope - center[:, None])), center


LogRatio = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log(p / q) of a block's tokens, from log q [N, block], log c [N] and a spread: the table [block] or log tau [N]."""


def _log_ratio_tabled(log_q: Tensor, log_c: Tensor, log_table: Tensor) -> Tensor:
    return log_c[:, None] + log_table - log_q


def _log_ratio_capped(log_q: Tensor, log_c: Tensor, log_tau: Tensor) -> Tensor:
    return torch.minimum(log_c[:, None], log_tau[:, None] - log_q)


def _dense(
    student: StudentRows,
    log_p: Tensor,
    log_ratio: LogRatio,
    log_c: Tensor,
    spread: Callable[[slice], Tensor],  # of a part of the vocabulary
    objective: Objective,
    weight: float,
) -> DistillationTerm:
    """Of tails each of whose tokens has a slope of its own: one more sweep for their sums."""
    divergence, log_normalizer = objective.divergence, student.tempered_normalizer
    parameter = torch.full((), divergence.parameter, dtype=log_p.dtype, device=log_p.device)
    tail = DenseTail(log_ratio, log_c, FORMULAS[divergence.name], parameter, student.scale, log_normalizer)
    value, slope = torch.zeros_like(log_c), torch.zeros_like(log_c)
    for part, z in student.tails():
        kernel(add_moments)(z, spread(part), tail, value, slope)
    term, center = _with_tail(student, log_p, value, slope, divergence, weight)

    def write(part: slice, z: Tensor, q_weight: Tensor) -> None:
        log_normalizer, kd_weight = student.log_normalizer, weight * student.scale
        kernel(write_dense_gradient)(z, spread(part), tail, log_normalizer, q_weight, center, kd_weight)

    term.write_dense = write
    return term


class DenseTail(NamedTuple):
    """What a pass over a block has to know."""

    log_ratio: LogRatio
    log_c: Tensor  # [N]
    formula: Formula
    parameter: Tensor  # the divergence's, on the device: made once, not for each block
    scale: float  # 1 / temperature
    log_normalizer: Tensor  # [N] of scale * z


def _log_q_and_ratio(z: Tensor, spread: Tensor, tail: DenseTail) -> tuple[Tensor, Tensor]:
    """log q and log(p / q) of a block in the precision of sums."""
    log_q = z * tail.scale - tail.log_normalizer[:, None]
    return log_q, tail.log_ratio(log_q, tail.log_c, spread).clamp_max(LARGEST_LOG_RATIO)


def add_moments(z: Tensor, spread: Tensor, tail: DenseTail, value: Tensor, slope: Tensor) -> None:
    """A pass that adds phi(p_j, q_j) and q_j d phi / d q of the tail's tokens to `value` and `slope` [N]."""
    log_q, log_ratio = _log_q_and_ratio(z.to(value.dtype), spread, tail)
    q = torch.exp(log_q)
    value += (q * tail.formula.term(log_ratio, torch.zeros_like(log_ratio), tail.parameter)).sum(-1)
    slope += (q * tail.formula.slope(log_ratio, tail.parameter)).sum(-1)


def write_dense_gradient(
    z: Tensor, spread: Tensor, tail: DenseTail, log_normalizer: Tensor, weight: Tensor, center: Tensor, kd_weight: float
) -> None:
    """A pass that turns logits into weight q1 + kd_weight q (slope(log p - log q) - center), in place, where q1 is the
    student at temperature 1 and q at the divergence's.
    """
    exact = z.to(weight.dtype)
    log_q, log_ratio = _log_q_and_ratio(exact, spread, tail)
    q = torch.exp(log_q)
    plain = q if tail.scale == 1 else torch.exp(exact - log_normalizer[:, None])
    slope = tail.formula.slope(log_ratio, tail.parameter)
    z.copy_(plain * weight[:, None] + kd_weight * q * (slope - center[:, None]))
