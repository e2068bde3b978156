"""The capped tail: the tightest lower bound of a divergence that a top-k cache allows.

The cache certifies more than the tail's mass p_t: no token outside the k cached ones is likelier than the k-th, tau.
Among all teachers that agree with the cache, the one nearest to the student has on the tail

    p*_j = min(tau, c q_j),  c such that they sum to p_t   (the KKT conditions; the same p* for every f-divergence)

and p* is a constant in the gradient (Danskin's theorem). Where no student tail token exceeds its cap, c = p_t / q_t and
the divergence is the lumped one.

c is found by Newton's method. F(c) = sum_j min(tau, c q_j) is concave and piecewise linear, so that the iterates rise
to the solution without passing it, and reach it exactly in the piece that holds it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.divergences import Divergence, slope_of, term_of
from microlm.objective.vocabulary_blocks import Entries, VocabularyBlocks, kernel

LOOK_AHEAD = (0.0, 0.12, 0.35, 0.9)  # of log c above the iterate: points where one sweep evaluates F
SWEEPS = 40
LARGEST_LOG_RATIO = 80.0  # exp of it is finite in float32


def cap_tail(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """p* over the whole vocabulary, by sorting: the dense oracle.

    Args:
        log_p: what the cache says, [..., k + 1], the tail's log-mass last.
        ids: int64 [..., k].
        log_q: the student, [..., V].

    Returns:
        log p* [..., V].
    """
    head, tail_mass = log_p[..., :-1], log_p[..., -1:].exp()
    n_tail = log_q.shape[-1] - ids.shape[-1]
    if n_tail == 0:
        return torch.empty_like(log_q).scatter(-1, ids, head)
    tau = torch.maximum(head.amin(-1, keepdim=True).exp(), tail_mass / n_tail)
    q = log_q.exp().scatter(-1, ids, -1.0).sort(-1, descending=True).values[..., :n_tail]
    capped = torch.arange(n_tail, device=log_q.device)
    rest = q.flip(-1).cumsum(-1).flip(-1)  # mass of the tail from the n-th largest on
    c = (tail_mass - capped * tau) / rest
    fits = (c * q <= tau * (1 + 1e-12)) | (capped == n_tail - 1)
    first = fits.to(torch.int8).argmax(-1, keepdim=True)
    log_c = c.gather(-1, first).clamp_min(torch.finfo(c.dtype).tiny).log()
    return torch.minimum(tau.log(), log_c + log_q).scatter(-1, ids, head)


@dataclass
class CappedTail:
    """What the divergence and its gradient need of each row's tail; all [N]."""

    log_c: Tensor
    log_tau: Tensor
    uncapped_mass: Tensor  # of the student
    value: Tensor  # sum of phi(tau, q_j) over the capped tokens
    slope: Tensor  # sum of q_j d phi / d q over them


def sum_above(z: Tensor, scale: float, log_normalizer: Tensor, thresholds: Tensor, count: Tensor, mass: Tensor) -> None:
    """Add to `count` and `mass` [N, G] the tokens with scale * z above each of the `thresholds` [N, G], and their q."""
    log_q = z.to(mass.dtype) * scale - log_normalizer[:, None]
    q = torch.exp(log_q)
    for g in range(thresholds.shape[1]):
        above = log_q > thresholds[:, g : g + 1]
        count[:, g] += above.to(mass.dtype).sum(-1)
        mass[:, g] += torch.where(above, q, 0.0).sum(-1)


def moments_above(name: str) -> Callable[..., None]:
    """A pass that adds phi(tau, q) and q d phi / d q of the tokens above log tau - log c."""
    term, slope_at = term_of(name), slope_of(name)

    def sum_moments(
        z: Tensor,
        scale: float,
        log_normalizer: Tensor,
        log_tau: Tensor,
        log_c: Tensor,
        parameter: Tensor,
        value: Tensor,
        slope: Tensor,
    ) -> None:
        log_q = z.to(value.dtype) * scale - log_normalizer[:, None]
        log_ratio = log_tau[:, None] - log_q
        above = log_ratio < log_c[:, None]
        log_ratio, q = torch.where(above, log_ratio, 0.0), torch.where(above, torch.exp(log_q), 0.0)
        value += (q * term(log_ratio, torch.zeros_like(log_ratio), parameter)).sum(-1)
        slope += (q * slope_at(log_ratio, parameter)).sum(-1)

    return sum_moments


def write_capped_gradient(name: str) -> Callable[..., None]:
    """A pass that turns logits into weight q1 + kd_weight q (slope(min(log c, log tau - log q)) - center), in place,
    where q1 is the student at temperature 1 and q at the divergence's.
    """
    slope_at = slope_of(name)

    def write(
        z: Tensor,
        log_normalizer: Tensor,
        weight: Tensor,
        scale: float,
        tempered_log_normalizer: Tensor,
        log_c: Tensor,
        log_tau: Tensor,
        center: Tensor,
        parameter: Tensor,
        kd_weight: float,
    ) -> None:
        exact = z.to(weight.dtype)
        log_q = exact * scale - tempered_log_normalizer[:, None]
        q = torch.exp(log_q)
        plain = q if scale == 1 else torch.exp(exact - log_normalizer[:, None])
        slope = slope_at(torch.minimum(log_c[:, None], log_tau[:, None] - log_q), parameter)
        z.copy_(plain * weight[:, None] + kd_weight * q * (slope - center[:, None]))

    return write


class _Tail:
    """Sweeps over the tails of some rows."""

    def __init__(self, blocks: VocabularyBlocks, rows: Tensor, ids: Tensor, log_normalizer: Tensor, scale: float):
        self.blocks, self.scale = blocks.of_rows(rows), scale
        self._cached = Entries(ids[rows], self.blocks.block, blocks.n_vocab)
        self._log_normalizer = log_normalizer[rows]

    def _each(self) -> Iterator[Tensor]:
        for index, _, z in self.blocks:
            r, c, _ = self._cached.at(index)
            z[r, c] = -torch.inf
            yield z

    def above(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        count, mass = torch.zeros_like(thresholds), torch.zeros_like(thresholds)
        add = kernel("sum_above", lambda: sum_above)
        for z in self._each():
            add(z, self.scale, self._log_normalizer, thresholds, count, mass)
        return count, mass

    def moments(self, log_tau: Tensor, log_c: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
        value, slope = torch.zeros_like(log_c), torch.zeros_like(log_c)
        parameter = log_c.new_tensor(divergence.parameter)
        add = kernel(f"moments_above_{divergence.name}", lambda: moments_above(divergence.name))
        for z in self._each():
            add(z, self.scale, self._log_normalizer, log_tau, log_c, parameter, value, slope)
        return value, slope


def solve(
    blocks: VocabularyBlocks,
    ids: Tensor,
    log_p: Tensor,
    log_normalizer: Tensor,
    log_tail: Tensor,
    largest: Tensor,
    divergence: Divergence,
    scale: float,
) -> CappedTail:
    """Water-filling by sweeps over the rows that need it.

    Args:
        ids: int64 [N, k].
        log_p: the cache's [N, k + 1].
        log_normalizer: of the student over the vocabulary, in units of scale * z, [N].
        log_tail: the same over the tail, [N].
        largest: the largest scaled logit of the tail, [N].
        scale: 1 / temperature.
    """
    n_tail = blocks.n_vocab - ids.shape[1]
    log_mass, tail_mass = log_p[:, -1], (log_tail - log_normalizer).exp()
    log_tau = log_p[:, :-1].amin(-1)
    if n_tail == 0:
        zero = torch.zeros_like(tail_mass)
        return CappedTail(zero, log_tau, zero, zero.clone(), zero.clone())
    log_tau = torch.maximum(log_tau, log_mass - float(torch.tensor(n_tail).log()))
    log_c = (log_mass - (log_tail - log_normalizer)).clamp_max(LARGEST_LOG_RATIO)
    tail = CappedTail(log_c, log_tau, tail_mass.clone(), torch.zeros_like(log_c), torch.zeros_like(log_c))
    capping = torch.nonzero(log_c + largest - log_normalizer > log_tau)[:, 0]
    rows, ahead = capping, log_c.new_tensor(LOOK_AHEAD)
    for _ in range(SWEEPS):
        if not len(rows):
            break
        points = log_c[rows, None] + ahead
        sweep = _Tail(blocks, rows, ids, log_normalizer, scale)
        count, above = sweep.above(log_tau[rows, None] - points)
        tau, mass, left = log_tau[rows, None].exp(), log_mass[rows, None].exp(), tail_mass[rows, None] - above
        reached = (count * tau + points.exp() * left <= mass).sum(-1, keepdim=True).clamp_min(1) - 1  # F is increasing
        left = left.gather(1, reached).clamp_min(torch.finfo(left.dtype).tiny)
        n = count.gather(1, reached)
        newton = ((mass - n * tau).clamp_min(torch.finfo(left.dtype).tiny) / left).log().clamp_max(LARGEST_LOG_RATIO)
        newton = torch.maximum(newton, points.gather(1, reached))
        log_c[rows], tail.uncapped_mass[rows] = newton[:, 0], left[:, 0]
        following = (reached + 1).clamp_max(len(ahead) - 1)
        same_piece = (following > reached) & (count.gather(1, following) == n)
        still = newton - points.gather(1, reached) < 1e-7
        rows = rows[~(same_piece | still)[:, 0]]
    if len(capping):
        sweep = _Tail(blocks, capping, ids, log_normalizer, scale)
        tail.value[capping], tail.slope[capping] = sweep.moments(log_tau[capping], log_c[capping], divergence)
    return tail
