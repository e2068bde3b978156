"""Teacher and student at some real positions, whole, and the shapes that a reader of a cache could give the tail."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from microlm.research.probe.tail_shapes import TailModel


class DensePositions:
    """Distributions over the whole vocabulary at N positions, and what the treatments share of them.

    Everything here is an oracle's: a cache keeps a part of it.
    """

    def __init__(
        self, log_p: Tensor, log_q: Tensor, hidden: Tensor | None = None, tails: TailModel | None = None
    ) -> None:
        """
        Args:
            log_p: teacher, float64 [N, V]; log_q: student, the same.
            hidden: the teacher's hidden states [N, D], which the shapes "code<r>" need.
            tails: of the same teacher; the shapes "table" and "code<r>" need it.
        """
        self.log_p, self.log_q = log_p, log_q
        self._hidden, self._tails = hidden, tails
        self._last_shape: tuple[str, dict[str, Tensor]] = ("", {})
        self._leading: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def shape(self, name: str) -> Tensor:
        """log f [N, V], normalized: "student", "table" or "code<number of directions>". The last is remembered."""
        if name == "student":
            return self.log_q
        return self._of_shape(name)["log_f"]

    def kl_of_shape(self, name: str) -> Tensor:
        """KL(f || q), [N]."""
        return torch.zeros_like(self.log_q[:, 0]) if name == "student" else self._of_shape(name)["forward"]

    def kl_to_shape(self, name: str) -> Tensor:
        """KL(q || f), [N]."""
        return torch.zeros_like(self.log_q[:, 0]) if name == "student" else self._of_shape(name)["reverse"]

    def _of_shape(self, name: str) -> dict[str, Tensor]:
        if self._last_shape[0] != name:
            if name == "table":
                log_f = self._tails.log_table.double().log_softmax(-1).expand_as(self.log_q)
            else:
                log_f = self._tails.decoded(self._hidden, int(name.removeprefix("code")))
            log_ratio = log_f - self.log_q
            sums = {"forward": (log_f.exp() * log_ratio).sum(-1), "reverse": -(self.log_q.exp() * log_ratio).sum(-1)}
            self._last_shape = (name, {"log_f": log_f, **sums})
        return self._last_shape[1]

    def leading(self, shape: str, width: int) -> tuple[Tensor, Tensor]:
        """The `width` largest log f and their ids, [N, width]."""
        if (shape, width) not in self._leading:
            values, ids = self.shape(shape).topk(width)
            self._leading[shape, width] = values, ids
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

    def tail_mass(self, k: int) -> Tensor:
        """[N]: teacher's mass outside the k most likely tokens; exactly 0 where k = V."""
        return self.cumulative[:, -1] - self.cumulative[:, k - 1]

    @cached_property
    def rising_sums(self) -> Tensor:
        """[N, V + 1]: sums of log q over the student's 0, 1, .. V least likely tokens."""
        rising = torch.from_numpy(np.sort(self.log_q.cpu().numpy(), -1)).to(self.log_q.device)
        return torch.cat((rising.new_zeros(len(rising), 1), rising.cumsum(-1)), -1)

    @cached_property
    def negative_entropy(self) -> Tensor:
        """sum_j q_j log q_j, [N]."""
        return (self.log_q.exp() * self.log_q).sum(-1)

    @cached_property
    def exact(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Direction -> divergence [N] and its gradient on the student's logits [N, V]: q - p and q (log q/p - L)."""
        p, q, log_ratio = self.log_p.exp(), self.log_q.exp(), self.log_q - self.log_p
        reverse = (q * log_ratio).sum(-1)
        return {
            "forward": (-(p * log_ratio).sum(-1), q - p),
            "reverse": (reverse, q * (log_ratio - reverse[:, None])),
        }
