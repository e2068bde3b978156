"""Tails that give every token a probability of its own: their sums and slopes, by whole passes over the logits.

Two are of this kind. The tabled tail has p_j = c u_j with one table u for all positions (table_tail.py); the capped one
p_j = min(tau, c q_j) (capped_tail.py), for which the CPU looks at single tokens instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.divergences import LARGEST_LOG_RATIO, Divergence, slope_of, term_of
from microlm.objective.vocabulary_blocks import AnyEntries, VocabularyBlocks, kernel


def _tabled(log_q: Tensor, log_c: Tensor, log_table: Tensor) -> Tensor:
    return log_c[:, None] + log_table - log_q


def _capped(log_q: Tensor, log_c: Tensor, log_tau: Tensor) -> Tensor:
    return torch.minimum(log_c[:, None], log_tau[:, None] - log_q)


LOG_RATIOS = {"table": _tabled, "capped": _capped}
"""log(p / q) of a block's tokens [N, block], from log q there, log c [N], and the table [block] or log tau [N]."""


@dataclass
class DenseTail:
    """p on the tail of N rows."""

    kind: str  # table | capped
    log_c: Tensor  # [N]
    spread: Tensor  # the logarithm of the table, [V], or of the cap, [N]

    def of(self, part: slice) -> Tensor:
        return self.spread[part] if self.kind == "table" else self.spread


def dense_moments(kind: str, name: str) -> Callable[..., None]:
    """A pass that adds phi(p_j, q_j) and q_j d phi / d q of the tail's tokens."""
    log_ratio_of, term, slope_at = LOG_RATIOS[kind], term_of(name), slope_of(name)

    def sum_moments(
        z: Tensor,
        scale: float,
        log_normalizer: Tensor,
        log_c: Tensor,
        spread: Tensor,
        parameter: Tensor,
        value: Tensor,
        slope: Tensor,
    ) -> None:
        log_q = z.to(value.dtype) * scale - log_normalizer[:, None]
        log_ratio = log_ratio_of(log_q, log_c, spread).clamp_max(LARGEST_LOG_RATIO)
        q = torch.exp(log_q)
        value += (q * term(log_ratio, torch.zeros_like(log_ratio), parameter)).sum(-1)
        slope += (q * slope_at(log_ratio, parameter)).sum(-1)

    return sum_moments


def write_dense_gradient(kind: str, name: str) -> Callable[..., None]:
    """A pass that turns logits into weight q1 + kd_weight q (slope(log p - log q) - center), in place, where q1 is the
    student at temperature 1 and q at the divergence's.
    """
    log_ratio_of, slope_at = LOG_RATIOS[kind], slope_of(name)

    def write(
        z: Tensor,
        log_normalizer: Tensor,
        weight: Tensor,
        scale: float,
        tempered_log_normalizer: Tensor,
        log_c: Tensor,
        spread: Tensor,
        center: Tensor,
        parameter: Tensor,
        kd_weight: float,
    ) -> None:
        exact = z.to(weight.dtype)
        log_q = exact * scale - tempered_log_normalizer[:, None]
        q = torch.exp(log_q)
        plain = q if scale == 1 else torch.exp(exact - log_normalizer[:, None])
        slope = slope_at(log_ratio_of(log_q, log_c, spread).clamp_max(LARGEST_LOG_RATIO), parameter)
        z.copy_(plain * weight[:, None] + kd_weight * q * (slope - center[:, None]))

    return write


@dataclass
class DenseSlope:
    """The distillation term's slopes on the tail's logits, weight q (slope(log p - log q) - center)."""

    divergence: Divergence
    parameter: Tensor  # the divergence's, on the device: made once, not for each block
    weight: float
    tail: DenseTail
    center: Tensor  # the mean of d phi / d q under the student, [N]
    log_normalizer: Tensor  # of z / T, [N]

    def write(self, z: Tensor, part: slice, log_normalizer: Tensor, q_weight: Tensor, scale: float) -> None:
        """Turn a block of logits into q_weight softmax(z) + these slopes, in place."""
        kind, name = self.tail.kind, self.divergence.name
        kernel(f"write_{kind}_gradient_{name}", lambda: write_dense_gradient(kind, name))(
            z,
            log_normalizer,
            q_weight,
            scale,
            self.log_normalizer,
            self.tail.log_c,
            self.tail.of(part),
            self.center,
            self.parameter,
            self.weight,
        )


def tail_moments(
    blocks: VocabularyBlocks,
    cached: AnyEntries,
    tail: DenseTail,
    log_normalizer: Tensor,
    divergence: Divergence,
    parameter: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sums over each row's tail of phi(p_j, q_j) and of q_j d phi / d q_j, both [N]: one sweep."""
    value, slope = torch.zeros_like(tail.log_c), torch.zeros_like(tail.log_c)
    name = divergence.name
    add = kernel(f"{tail.kind}_moments_{name}", lambda: dense_moments(tail.kind, name))
    for index, part, z in blocks:
        cached.write(index, z, -torch.inf)
        add(z, scale, log_normalizer, tail.log_c, tail.of(part), parameter, value, slope)
    return value, slope
