"""Whole distributions, to hold against what the fused head makes of a sparse teacher: the oracles."""

import torch
from torch import Tensor

from microlm.objective.tails import scale_to_mass


def lump(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Coarsen dense distributions to the symbols `ids` and one for all the others.

    Args:
        log_probabilities: [..., V].
        ids: int64 [..., k], distinct in each row.

    Returns:
        [..., k + 1], the tail's log-mass last; -inf where k = V leaves no tail.
    """
    head = log_probabilities.gather(-1, ids)
    rest = log_probabilities.scatter(-1, ids, -torch.inf)
    return torch.cat((head, rest.logsumexp(-1, keepdim=True)), dim=-1)


def cap_tail(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """p* over the whole vocabulary, by sorting.

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


def table_tail(log_p: Tensor, ids: Tensor, log_table: Tensor) -> Tensor:
    """log p over the whole vocabulary, [..., V]."""
    dense = scale_to_mass(log_p, ids, log_table)[..., None] + log_table.to(log_p.dtype)
    return dense.scatter(-1, ids, log_p[..., :-1])
