"""Divergences between a teacher p and a student q, given as log-probabilities over the same symbols.

The same functions serve a dense teacher (V symbols, the oracle) and the sparse cache (k + 1 symbols: the cached ids K
and the whole tail lumped into one). A lumped divergence never exceeds the true one and is never negative (the log-sum
inequality; Cover and Thomas 2006, theorem 2.7.1), so the tail is neither dropped, renormalized nor floored.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def _expectation(log_weight: Tensor, log_ratio: Tensor) -> Tensor:
    """sum_i exp(log_weight_i) * log_ratio_i over the last axis, with 0 * (anything) = 0."""
    present = log_weight > -torch.inf
    terms = torch.where(present, log_weight.exp() * torch.where(present, log_ratio, 0.0), 0.0)
    return terms.sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_i q_i log(q_i / p_i): mode-seeking (Gu et al. 2024, arXiv:2306.08543, equation 1).

    Args:
        log_p: teacher log-probabilities [..., S].
        log_q: student log-probabilities [..., S].

    Returns:
        Nats [...].
    """
    return _expectation(log_q, log_q - log_p)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_i p_i log(p_i / q_i): mass-covering (Hinton et al. 2015, arXiv:1503.02531).

    Arguments and result as `reverse_kl`.
    """
    return _expectation(log_p, log_p - log_q)


DIVERGENCES: dict[str, Divergence] = {"rkl": reverse_kl, "fkl": forward_kl}


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


def temper(log_p_head: Tensor, log_tail: Tensor, temperature: float) -> Tensor:
    """The lumped teacher at a temperature: p_i^(1/T) normalized over the vocabulary.

    Args:
        log_p_head: log-probabilities of the cached ids at temperature 1, [..., k].
        log_tail: log of the sum of p_j^(1/T) over all other ids, [...]. It has to come from the capture: one number for
            the tail at temperature 1 does not fix it.

    Returns:
        Log-probabilities [..., k + 1], the tail last.
    """
    unnormalized = torch.cat((log_p_head / temperature, log_tail.unsqueeze(-1)), dim=-1)
    return unnormalized - unnormalized.logsumexp(-1, keepdim=True)
