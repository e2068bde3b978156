"""What a loss is made of: the objective, and what a cache says of the teacher."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from microlm.objective.divergences import Divergence


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


@dataclass(frozen=True)
class Objective:
    """ce_weight CE + kd_weight D(teacher, student at temperature) + z_loss logsumexp^2, each a mean over tokens."""

    ce_weight: float = 1.0
    kd_weight: float = 0.0
    divergence: Divergence = Divergence("rkl")
    temperature: float = 1.0
    tail: Literal["lumped", "capped", "table"] = "lumped"
    z_loss: float = 0.0
