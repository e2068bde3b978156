"""Teacher and student at some real positions, whole, and the shapes that a reader of a cache could give the tail.

Beyond a position's own top k a reader knows the student's distribution, and two shapes learned once from the teacher. A
table: log of the mean probability of each token, the same at every position, 0 bytes a token. A code: the position's
hidden state in r directions of 2 bits each; decoded, the teacher's own head turns it into logits.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 128  # positions whose distributions exist at once
# where a normal variable is cut and what each part is read as, in standard deviations (Lloyd-Max; Max 1960)
CUTS, LEVELS = (-0.9816, 0.0, 0.9816), (-1.5104, -0.4528, 0.4528, 1.5104)


@dataclass(frozen=True)
class TailModel:
    """The teacher's average tail, and the directions in which its logits vary most."""

    log_table: Tensor  # [V], normalized
    mean_logits: Tensor  # [V]
    mean: Tensor  # of the hidden state, [D]
    encode: Tensor  # [D, D]: hidden state less its mean -> coordinates of unit variance, the weightiest first
    decode: Tensor  # [D, V]: coordinates -> logits less their mean

    @classmethod
    def fit(cls, hidden: Tensor, weight: Tensor) -> "TailModel":
        """Learn from the teacher's hidden states [N, D] and its head's real rows [V, D].

        The directions are those of largest variance in the logits, tokens weighted by their mean probability: the
        principal components of A^T h, where A A^T = sum_j u_j w_j w_j^T.
        """
        hidden, weight = hidden.float(), weight.float()
        total = torch.zeros(len(weight), dtype=torch.float64, device=hidden.device)
        for part in hidden.split(CHUNK):
            total += (part @ weight.T).softmax(-1).sum(0)
        table = (total / total.sum()).clamp_min(torch.finfo(torch.float32).tiny)
        centered = (weight.double() - (table[:, None] * weight).sum(0)).to(torch.float64)
        spread = (centered * table[:, None]).T @ centered
        spread += 1e-6 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
        factor = torch.linalg.cholesky(spread)
        mean = hidden.double().mean(0)
        covariance = torch.cov((hidden.double() - mean).T)
        variance, directions = torch.linalg.eigh(factor.T @ covariance @ factor)
        variance = variance.flip(0).clamp_min(1e-12 * variance[-1])
        directions, scale = directions.flip(1), variance.sqrt()
        decode = (torch.linalg.inv(factor).T @ directions * scale).T.float() @ weight.T
        encode = (factor @ directions / scale).float()
        return cls(table.log().float().log_softmax(-1), weight @ mean.float(), mean.float(), encode, decode)

    def decoded(self, hidden: Tensor, directions: int) -> Tensor:
        """log f [N, V], float64, of hidden states [N, D] that were coded in the first `directions` directions."""
        coordinates = (hidden.float() - self.mean) @ self.encode[:, :directions]
        levels = torch.tensor(LEVELS, device=hidden.device)
        read = levels[torch.bucketize(coordinates, torch.tensor(CUTS, device=hidden.device))]
        return (self.mean_logits + read @ self.decode[:directions]).double().log_softmax(-1)


class Shape(NamedTuple):
    """What a reader takes for the tail's: f, over the vocabulary (`DensePositions.shape`), beside the student's q."""

    log_f: Tensor  # [N, V]
    kl_of: Tensor  # KL(f || q), [N]
    kl_to: Tensor  # KL(q || f), [N]


@dataclass(eq=False)
class DensePositions:
    """Distributions over the whole vocabulary at N positions, and what the treatments share of them.

    Everything here is an oracle's: a cache keeps a part of it.
    """

    log_p: Tensor  # teacher, float64 [N, V]
    log_q: Tensor  # student, the same
    hidden: Tensor | None = None  # the teacher's hidden states [N, D], which the shapes "code<r>" need
    tails: TailModel | None = None  # of the same teacher; the shapes "table" and "code<r>" need it
    _last_shape: tuple[str, Shape | None] = ("", None)
    _leading: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """ "student", "flat" (f = 1), "table" or "code<number of directions>". The last is remembered."""
        if self._last_shape[0] != name:
            if name == "student":
                log_f = self.log_q
            elif name == "flat":
                log_f = torch.zeros_like(self.log_q)
            elif name == "table":
                log_f = self.tails.log_table.double().log_softmax(-1).expand_as(self.log_q)
            else:
                log_f = self.tails.decoded(self.hidden, int(name.removeprefix("code")))
            log_ratio = log_f - self.log_q
            kl_of, kl_to = (log_f.exp() * log_ratio).sum(-1), -(self.log_q.exp() * log_ratio).sum(-1)
            self._last_shape = (name, Shape(log_f, kl_of, kl_to))
        return self._last_shape[1]

    def leading(self, shape: str, width: int) -> tuple[Tensor, Tensor]:
        """The `width` largest log f and their ids, [N, width]."""
        if (shape, width) not in self._leading:
            self._leading[shape, width] = self.shape(shape).log_f.topk(width)
        return self._leading[shape, width]

    @cached_property
    def ranked_ids(self) -> Tensor:
        """int64 [N, V], the teacher's most likely token first."""
        order = np.argsort(-self.log_p.cpu().numpy(), -1)  # on a CPU several times as fast as torch's
        return torch.from_numpy(order).to(self.log_p.device)

    @cached_property
    def ranked_log_p(self) -> Tensor:
        """[N, V], descending."""
        return self.log_p.gather(-1, self.ranked_ids)

    @cached_property
    def ranks(self) -> Tensor:
        """int64 [N, V]: each token's place in `ranked_ids`."""
        places = torch.arange(self.log_p.shape[1], device=self.log_p.device).expand_as(self.ranked_ids)
        return torch.empty_like(self.ranked_ids).scatter_(-1, self.ranked_ids, places)

    @cached_property
    def cumulative(self) -> Tensor:
        """[N, V]: teacher's mass of ranks 0 .. i."""
        return self.ranked_log_p.exp().cumsum(-1)

    @cached_property
    def rising_sums(self) -> Tensor:
        """[N, V + 1]: sums of log q over the student's 0, 1, .. V least likely tokens."""
        rising = torch.from_numpy(np.sort(self.log_q.cpu().numpy(), -1)).to(self.log_q.device)
        return torch.cat((rising.new_zeros(len(rising), 1), rising.cumsum(-1)), -1)

    @cached_property
    def exact(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Direction -> divergence [N] and its gradient on the student's logits [N, V]: q - p and q (log q/p - L)."""
        p, q, log_ratio = self.log_p.exp(), self.log_q.exp(), self.log_q - self.log_p
        reverse = (q * log_ratio).sum(-1)
        return {
            "forward": (-(p * log_ratio).sum(-1), q - p),
            "reverse": (reverse, q * (log_ratio - reverse[:, None])),
        }
