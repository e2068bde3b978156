"""Gradients of the LM head's weight summed over a step, in few enough numbers to keep them for hundreds of methods.

The step's gradient [V, D] of each of hundreds of methods is not kept whole: the vocabulary is folded to `BUCKETS` rows
with random signs (count sketch; Charikar et al. 2002, doi:10.1016/S0304-3975(03)00400-6) and the hidden state is
projected to `WIDTH` random directions where it has more. Both keep the Frobenius norm on average.
"""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

BUCKETS, WIDTH = 256, 256


class CountSketch:
    """Folds rows over the vocabulary, and hidden states, to fewer numbers; linear, the same for every method."""

    def __init__(self, vocabulary: int, hidden_size: int, seed: int, device: torch.device) -> None:
        draws = Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (vocabulary,), generator=draws).mul(2).sub(1)
        self.signs = signs.to(device, torch.float64)
        projection = torch.randn(hidden_size, WIDTH, generator=draws) / WIDTH**0.5
        self._projection = (projection if hidden_size > WIDTH else torch.eye(hidden_size)).to(device)

    def fold(self, rows: Tensor) -> Tensor:
        """[..., V] -> [..., BUCKETS]: token j joins bucket j mod BUCKETS with its sign."""
        whole = len(self.signs) // BUCKETS * BUCKETS
        signs = self.signs[:whole].view(-1, BUCKETS)
        folded = (rows[..., :whole].unflatten(-1, (-1, BUCKETS)) * signs).sum(-2)
        folded[..., : len(self.signs) - whole] += rows[..., whole:] * self.signs[whole:]
        return folded

    def fold_entries(self, ids: Tensor, values: Tensor) -> Tensor:
        """Ids and values [N, m] of rows that are zero elsewhere -> [N, BUCKETS]."""
        folded = values.new_zeros(len(ids), BUCKETS)
        return folded.scatter_add_(-1, ids % BUCKETS, values * self.signs[ids])

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, at most WIDTH]."""
        return hidden.float() @ self._projection


@dataclass
class StepSums:
    """Sketched gradients of the head's weight, summed over steps and over everything."""

    norms: dict[tuple, list[float]] = field(default_factory=dict)  # of each finished step
    _step: dict[tuple, Tensor] = field(default_factory=dict)
    _whole: dict[tuple, Tensor] = field(default_factory=dict)

    def add(self, key: tuple, folded: Tensor, hidden: Tensor) -> None:
        """key: what the rows are of; folded [N, BUCKETS]; hidden as `CountSketch.project` gives it."""
        part = folded.float().T @ hidden
        self._step[key] = self._step[key].add_(part) if key in self._step else part

    def end_step(self) -> None:
        for key, total in self._step.items():
            self._whole[key] = self._whole[key].add_(total) if key in self._whole else total
            self.norms.setdefault(key, []).append(float(total.norm()))
        self._step = {}

    def relative(self, key: tuple, exact: tuple, steps: int) -> tuple[float, float]:
        """Norm of `key` over that of `exact`: mean over the first `steps` steps, and of the sum over everything."""
        ratios = [error / true for error, true in zip(self.norms[key], self.norms[exact])][:steps]
        return sum(ratios) / len(ratios), float(self._whole[key].norm() / self._whole[exact].norm())
