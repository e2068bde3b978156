"""Gradients on the student's logits, dense and from what a cache leaves of the teacher, in closed form.

With a slope s_j = dD/dq_j (target held fixed) the gradient on logit j is q_j (s_j - sum_i q_i s_i). Off the ids that a
cache lists, every treatment's gradient is one combination a row of q, q log q, f and q log f, where f is the shape that
the treatment gives the tail: no treatment needs a pass over the vocabulary.

Shapes: N positions, V vocabulary, k cached ids, m listed entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.research.probe.dense_positions import DensePositions

TERMS = ("q", "q log q", "f", "q log f")


@dataclass(frozen=True)
class Target:
    """What a cache says of the teacher: mass at the listed ids, and c f_j at every other id j.

    f is a distribution over the vocabulary that the reader knows: by default the student's own; or 1 everywhere.
    """

    ids: Tensor  # int64 [N, m]; distinct where `listed`
    log_p: Tensor  # float64 [N, m]
    log_c: Tensor  # float64 [N]; -inf: no mass off the list
    listed: Tensor  # bool [N, m]; entries that are not listed only fill the row
    shape: str = "student"  # f, as `DensePositions.shape` names it

    def at_entries(self, log_f: Tensor) -> tuple[Tensor, Tensor]:
        """log f and f [N, m] of a distribution over the vocabulary; f is 0 where nothing is listed."""
        log_f = log_f.gather(-1, self.ids)
        return log_f, torch.where(self.listed, log_f.exp(), 0.0)

    def mass(self) -> Tensor:
        """[N, m]: the target's probabilities of the entries."""
        return torch.where(self.listed, self.log_p.exp(), 0.0)

    def log_ratio(self, log_q: Tensor) -> Tensor:
        """[N, m]: log(q / t), 0 where nothing is listed."""
        return torch.where(self.listed, log_q - self.log_p, 0.0)

    def joined(self, ids: Tensor, log_p: Tensor, listed: Tensor, log_c: Tensor) -> "Target":
        """With more entries [N, m], and another c for what is off the list then."""
        more = ((self.ids, ids), (self.log_p, log_p), (self.listed, listed))
        ids, log_p, listed = (torch.cat(both, -1) for both in more)
        return Target(ids, log_p, log_c, listed, self.shape)


@dataclass(frozen=True)
class RowGradient:
    """A divergence and its gradient: `entries` at the target's ids, sums of `TERMS` at every other id."""

    value: Tensor  # [N] nats
    entries: Tensor  # [N, m]
    coefficients: Tensor  # [N, 4]


Treatment = Callable[[Target, DensePositions], RowGradient]


def terms(at: DensePositions, shape: str) -> Tensor:
    """The two `TERMS` of a shape, f and q log f, [N, 2, V]; those of "student" are the first two."""
    log_f = at.shape(shape).log_f
    return torch.stack((log_f.exp(), at.log_q.exp() * log_f), 1)


def _row(value: Tensor, entries: Tensor, *coefficients: Tensor | float) -> RowGradient:
    columns = [torch.as_tensor(c, dtype=value.dtype, device=value.device).expand_as(value) for c in coefficients]
    return RowGradient(value, entries, torch.stack(columns, -1))


def _product(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio with 0 * (anything) = 0."""
    return torch.where(weight > 0, weight * log_ratio, 0.0)


def _rest(total: Tensor | float, listed: Tensor) -> Tensor:
    """What the listed ids leave of a total, [N]; rounding must not make it negative."""
    return (total - listed.sum(-1)).clamp_min(0)


def forward_kl(target: Target, at: DensePositions) -> RowGradient:
    """sum_j t_j log(t_j / q_j) over the target t; gradient |t| q - t, where |t| is the target's whole mass."""
    shape, (log_q, q) = at.shape(target.shape), target.at_entries(at.log_q)
    (log_f, f), t, c = target.at_entries(shape.log_f), target.mass(), target.log_c.exp()
    rest = c * _rest(1.0, f)
    whole = t.sum(-1) + rest
    apart = shape.kl_of - (f * (log_f - log_q)).sum(-1)  # sum off the list of f log(f / q)
    value = _product(t, target.log_p - log_q).sum(-1) + _product(rest, target.log_c) + c * apart
    return _row(value, whole[:, None] * q - t, whole, 0.0, -c, 0.0)


def reverse_kl(target: Target, at: DensePositions) -> RowGradient:
    """sum_j q_j log(q_j / t_j); gradient q_j (log q_j/t_j - L). Infinite where the target leaves a token no mass."""
    shape, (log_q, q) = at.shape(target.shape), target.at_entries(at.log_q)
    log_f, log_ratio = shape.log_f.gather(-1, target.ids), target.log_ratio(log_q)
    log_c = torch.where(target.log_c > -torch.inf, target.log_c, 0.0)  # -inf: the whole vocabulary is listed
    apart = shape.kl_to - (q * (log_q - log_f)).sum(-1)  # sum off the list of q log(q / f)
    value = (q * log_ratio).sum(-1) + apart - _rest(1.0, q) * log_c
    return _row(value, q * (log_ratio - value[:, None]), -log_c - value, 1.0, 0.0, -1.0)


def conditional_reverse_kl(target: Target, at: DensePositions) -> RowGradient:
    """KL of both sides renormalized to the listed ids (axolotl): the student's mass elsewhere goes unseen."""
    log_q, q = target.at_entries(at.log_q)
    q_listed, t_listed = q.sum(-1, keepdim=True), target.mass().sum(-1, keepdim=True)
    among = q / q_listed
    log_ratio = torch.where(target.listed, log_q - q_listed.log() - (target.log_p - t_listed.log()), 0.0)
    value = (among * log_ratio).sum(-1)
    return _row(value, among * (log_ratio - value[:, None]), 0.0, 0.0, 0.0, 0.0)


def dropped_reverse_kl(target: Target, at: DensePositions) -> RowGradient:
    """sum over the listed ids alone of q log(q / t) (verl's open reverse top-k): may be negative."""
    log_q, q = target.at_entries(at.log_q)
    log_ratio = target.log_ratio(log_q)
    pull = (q * (log_ratio + 1)).sum(-1)
    return _row((q * log_ratio).sum(-1), q * (log_ratio + 1 - pull[:, None]), -pull, 0.0, 0.0, 0.0)


def cap(target: Target, at: DensePositions, width: int = 1024) -> Target:
    """Bound a target's tail by tau, its k-th probability: t_j = min(tau, c f_j), c so that the tail keeps its mass.

    With the student's own shape it is, of all teachers that a top-k cache allows, the one nearest to the student in
    either direction of KL (the conditions of Karush, Kuhn and Tucker), so that its divergence is the tightest lower
    bound. The capped tokens have the tail's largest f; they join the list.

    Args:
        target: the k most likely ids by descending probability.
        width: of the largest f searched; widened until no capped token can lie beyond.
    """
    k, vocabulary = target.ids.shape[1], at.log_q.shape[1]
    tiny = torch.finfo(target.log_p.dtype).tiny
    log_f, ids = at.leading(target.shape, min(width, vocabulary))
    outside = at.ranks.gather(-1, ids) >= k
    f, order = torch.where(outside, log_f.exp(), 0.0).sort(-1, descending=True)
    f_tail = _rest(1.0, target.at_entries(at.shape(target.shape).log_f)[1]).clamp_min(tiny)
    p_tail = target.log_c.exp() * f_tail
    tau = torch.maximum(target.log_p.amin(-1).exp(), p_tail / max(1, vocabulary - k))  # float16 may round it too low
    capped = torch.arange(f.shape[1], device=f.device)  # how many, if the next one is not
    left = (f_tail[:, None] - (f.cumsum(-1) - f)).clamp_min(tiny)
    c = (p_tail[:, None] - capped * tau[:, None]) / left
    fits = c * f <= tau[:, None]
    if width < vocabulary and not (fits & (f > 0)).any(-1).all():
        return cap(target, at, 8 * width)
    count = torch.where(fits.any(-1), fits.int().argmax(-1), outside.sum(-1).clamp_max(f.shape[1] - 1))
    log_c = c.gather(-1, count[:, None])[:, 0].clamp_min(0).log()
    listed = (capped < count[:, None])[:, : int(count.max())]
    spikes = ids.gather(-1, order)[:, : listed.shape[1]]
    return target.joined(spikes, tau.log()[:, None].expand_as(spikes), listed, log_c)


def forward_upper_bound(target: Target, k: int, at: DensePositions) -> Tensor:
    """The largest KL(p || q) of any teacher that a cache of the k most likely tokens, `target`'s first, allows, [N].

    A convex function is largest at a corner: tau on as many of the student's least likely tokens as the tail's mass
    fills, the rest on the next. Cached ids among these tokens are not left out, which can only raise the bound.
    """
    log_p, log_q = target.log_p[:, :k], at.log_q.gather(-1, target.ids[:, :k])
    tail, tau = (1 - log_p.exp().sum(-1)).clamp_min(0), log_p.amin(-1).exp()
    full = torch.floor(tail / tau).long().clamp_max(at.log_q.shape[1] - 1)
    rest = (tail - full * tau).clamp_min(0)
    sums = at.rising_sums.gather(-1, full[:, None])[:, 0]
    last = at.rising_sums.gather(-1, full[:, None] + 1)[:, 0] - sums
    listed = (log_p.exp() * (log_p - log_q)).sum(-1)
    return listed + full * tau * tau.log() - tau * sums + _product(rest, rest.log() - last)
