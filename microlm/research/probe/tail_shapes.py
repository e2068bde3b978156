"""What a reader could know of a teacher's tail beyond a position's own top k, learned once from the teacher.

Two shapes. A table: log of the mean probability of each token, the same at every position, 0 bytes a token. A code: the
position's hidden state in r directions of 2 bits each; decoded, the teacher's own head turns it into logits.
"""

import math
from dataclasses import dataclass

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
        return cls(
            table.log().float().log_softmax(-1),
            weight @ mean.float(),
            mean.float(),
            (factor @ directions / scale).float(),
            decode,
        )

    def decoded(self, hidden: Tensor, directions: int) -> Tensor:
        """log f [N, V], float64, of hidden states [N, D] that were coded in the first `directions` directions."""
        coordinates = (hidden.float() - self.mean) @ self.encode[:, :directions]
        levels = torch.tensor(LEVELS, device=hidden.device)
        read = levels[torch.bucketize(coordinates, torch.tensor(CUTS, device=hidden.device))]
        return (self.mean_logits + read @ self.decode[:directions]).double().log_softmax(-1)


def code_bytes(directions: int) -> int:
    """Bytes of one position's code."""
    return math.ceil(directions * math.log2(len(LEVELS)) / 8)
