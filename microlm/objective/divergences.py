"""Divergences between a teacher p and a student q, given as log-probabilities over the same symbols.

The same functions serve a dense teacher (V symbols, the oracle) and the sparse cache (k + 1 symbols: the cached ids K
and the whole tail lumped into one). All are f-divergences, D = sum_i q_i g(p_i / q_i) with g convex: a lumped one never
exceeds the true one and is never negative (data processing; Csiszar and Shields 2004, lemma 4.1), so the tail is
neither dropped, renormalized nor floored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Parameter = float | Tensor
LARGEST_LOG_RATIO = 80.0  # of p to q; exp of it is finite in float32


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """x log(x / y), and 0 where x = 0, in the value and in the gradient."""
    log_ratio, present = log_x - log_y, log_x > -torch.inf
    return torch.where(present, log_x.exp() * torch.where(present, log_ratio, 0.0), 0.0)


def mixture(log_p: Tensor, log_q: Tensor, share: Parameter) -> Tensor:
    """log(share * p + (1 - share) * q), -inf where both are 0."""
    present = torch.maximum(log_p, log_q) > -torch.inf
    a, b = torch.where(present, log_p, 0.0), torch.where(present, log_q, 0.0)
    share = torch.as_tensor(share, dtype=log_q.dtype, device=log_q.device)
    return torch.where(present, torch.logaddexp(a + share.log(), b + torch.log1p(-share)), -torch.inf)


def _jsd(log_p: Tensor, log_q: Tensor, beta: Parameter) -> Tensor:
    log_m = mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _skew_forward_kl_slope(log_r: Tensor, skew: Parameter) -> Tensor:
    r = log_r.exp()
    return -(1 - skew) * r / (skew * r + (1 - skew))


def _skew_reverse_kl_slope(log_r: Tensor, skew: Parameter) -> Tensor:
    u = (1 - skew) * log_r.exp() + skew
    return 1 - torch.log(u) - skew / u


def _notebook_slope(log_r: Tensor, mix: Parameter) -> Tensor:
    u = mix * log_r.exp() + (1 - mix)
    return (1 - mix) * (torch.log(u) + 1) - u


class Formula(NamedTuple):
    """Of a divergence sum_i phi(p_i, q_i). A parameter in a tensor lets a compiled caller serve every value of it."""

    term: Callable[[Tensor, Tensor, Parameter], Tensor]  # phi of log p, log q
    slope: Callable[[Tensor, Parameter], Tensor]  # d phi / d q, a function of log(p / q) alone


FORMULAS = {
    "fkl": Formula(lambda log_p, log_q, _: _kl(log_p, log_q), lambda log_r, _: -log_r.exp()),
    "rkl": Formula(lambda log_p, log_q, _: _kl(log_q, log_p), lambda log_r, _: 1 - log_r),
    "jsd": Formula(_jsd, lambda log_r, b: -(1 - b) * torch.log(b * log_r.exp() + (1 - b))),
    "skew_fkl": Formula(lambda log_p, log_q, s: _kl(log_p, mixture(log_p, log_q, s)), _skew_forward_kl_slope),
    "skew_rkl": Formula(lambda log_p, log_q, s: _kl(log_q, mixture(log_p, log_q, 1 - s)), _skew_reverse_kl_slope),
    "tvd": Formula(
        lambda log_p, log_q, _: 0.5 * (log_p.exp() - log_q.exp()).abs(), lambda log_r, _: -0.5 * log_r.sign()
    ),
    "notebook": Formula(lambda log_p, log_q, a: _kl(mixture(log_p, log_q, a), log_q), _notebook_slope),
}


@dataclass(frozen=True)
class Divergence:
    """D(p, q) = sum_i phi(p_i, q_i), in nats, phi homogeneous of degree 1.

    | name     | D                                              | parameter   | source                                 |
    |----------|------------------------------------------------|-------------|----------------------------------------|
    | fkl      | KL(p, q)                                       |             | Hinton et al. 2015, arXiv:1503.02531   |
    | rkl      | KL(q, p)                                       |             | Gu et al. 2024, arXiv:2306.08543, eq. 1|
    | jsd      | b KL(p, m) + (1-b) KL(q, m), m = b p + (1-b) q | beta b      | Agarwal et al. 2024, arXiv:2306.13649  |
    | skew_fkl | KL(p, s p + (1-s) q)                           | skew s      | Ko et al. 2024, arXiv:2402.03898, eq. 2|
    | skew_rkl | KL(q, (1-s) p + s q) <= log(1/s)               | skew s      | the same                               |
    | tvd      | 1/2 sum |p - q|                                |             | Wen et al. 2023, arXiv:2307.15190      |
    | notebook | KL(a p + (1-a) q, q), gradient through both    | mix a       | github.com/hachoj/rKLD_Research        |

    KL(x, y) = sum_i x_i log(x_i / y_i).
    """

    name: str
    parameter: float = math.nan

    def __post_init__(self) -> None:
        if self.name not in FORMULAS:
            raise ValueError(f"{self.name} is none of {', '.join(FORMULAS)}")

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """phi(p_i, q_i), the shape of both."""
        return FORMULAS[self.name].term(log_p, log_q, self.parameter)

    def slope(self, log_ratio: Tensor) -> Tensor:
        """d phi / d q, a function of log(p / q) alone."""
        return FORMULAS[self.name].slope(log_ratio, self.parameter)

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[..., S], [..., S] -> nats [...]."""
        return self.term(log_p, log_q).sum(-1)


@dataclass(frozen=True)
class SparseTeacher:
    """What the cache says of N positions."""

    ids: Tensor  # int64 [N, k], distinct in each row
    log_p: Tensor  # float [N, k + 1] at the objective's temperature, the tail's log-mass last
    log_table: Tensor | None = None  # float [V], for tail: table, at the objective's temperature
    covered: Tensor | None = None  # bool [N], where the teacher speaks; None: everywhere

    def of(self, rows: Tensor) -> "SparseTeacher":
        """The rows numbered `rows`, int64 [n], all of them covered."""
        return SparseTeacher(self.ids[rows], self.log_p[rows], self.log_table)


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
