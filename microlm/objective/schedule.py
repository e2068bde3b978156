"""What is minimized at each moment of a training: weights and mixture that may change with its progress."""

import math
from dataclasses import dataclass
from typing import Literal

from microlm.objective.divergences import Divergence
from microlm.parameters import NOTEBOOK_TEMPERATURE

NOTEBOOK_MIX = (0.9, 0.1)  # a at the start and at the end (github.com/hachoj/rKLD_Research, src/train_KD.py)


@dataclass(frozen=True)
class Objective:
    """ce_weight CE + kd_weight D(teacher, student at temperature) + z_loss logsumexp^2, each a mean over tokens."""

    ce_weight: float = 1.0
    kd_weight: float = 0.0
    divergence: Divergence = Divergence("rkl")
    temperature: float = 1.0
    tail: Literal["lumped", "capped", "table"] = "lumped"
    z_loss: float = 0.0


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class AlphaSchedule:
    """The weight of the distillation term over a training.

    `warmup_stable_decay` rises from `end` to `start` and falls back at the fractions of the learning rate's schedule
    (WSD-alpha: Peng et al. 2024, arXiv:2410.16215).
    """

    kind: str
    start: float
    end: float
    warmup_fraction: float
    decay_fraction: float

    def __call__(self, progress: float) -> float:
        """alpha in [0, 1] at `progress` in [0, 1]."""
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        if self.kind == "cosine":
            return cosine(self.start, self.end, progress)
        rising = progress / self.warmup_fraction if self.warmup_fraction else 1.0
        falling = (1 - progress) / self.decay_fraction if self.decay_fraction else 1.0
        return self.end + (self.start - self.end) * min(1.0, rising, falling)


@dataclass(frozen=True)
class ObjectiveSchedule:
    """(1 - alpha) CE + alpha T^2 D, or the notebook's loss, as a function of progress."""

    name: str
    alpha: AlphaSchedule
    temperature: float
    parameter: float | None  # beta or skew
    tail: str
    z_loss: float

    def __call__(self, progress: float) -> Objective:
        """The objective at `progress` in [0, 1]. For minillm its cross-entropy part alone: the rest is on-policy."""
        if self.name == "notebook":
            mixed = Divergence("notebook", cosine(*NOTEBOOK_MIX, progress))
            return Objective(0.0, 1.0, mixed, NOTEBOOK_TEMPERATURE, self.tail, self.z_loss)
        alpha = self.alpha(progress)
        if self.name == "minillm":
            return Objective(1 - alpha, z_loss=self.z_loss)
        chosen = Divergence(self.name, math.nan if self.parameter is None else self.parameter)
        return Objective(1 - alpha, alpha * self.temperature**2, chosen, self.temperature, self.tail, self.z_loss)

    def describe(self) -> str:
        """One line for the banner."""
        if self.name == "notebook":
            start, end = NOTEBOOK_MIX
            return f"KL(a p + (1 - a) q, q), a from {start} to {end}, at temperature {NOTEBOOK_TEMPERATURE:g}, no T^2"
        kind, start, end = self.alpha.kind, self.alpha.start, self.alpha.end
        rest, weight = "(1 - alpha)", f"alpha ({kind}, {start:g} to {end:g})"
        if kind == "constant":
            rest, weight = f"{1 - start:g}", f"{start:g}"
        named = self.name if self.parameter is None else f"{self.name}({self.parameter:g})"
        how = "on-policy" if self.name == "minillm" else f"{self.tail} tail, at temperature {self.temperature:g}"
        return f"{rest} cross-entropy + {weight} {named}, {how}"
