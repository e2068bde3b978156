"""What the trainings minimize, as the training loop takes them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from microlm.corpus.batches import Batch
from microlm.objective.fused_head import HeadLoss, fused_head_loss
from microlm.objective.on_policy import MiniLLM
from microlm.objective.schedule import Objective, ObjectiveSchedule
from microlm.teacher.cache import TeacherCache
from microlm.teacher.recorders import LiveTeacher
from microlm.training.loop import Loss


@dataclass(frozen=True)
class Distillation:
    """The loss of `distill`. Where alpha is 0 the teacher is not asked and the bits are those of `cross_entropy`."""

    n_vocab: int
    schedule: Callable[[float], Objective]  # as `ObjectiveSchedule`
    teacher: TeacherCache | LiveTeacher | None

    def __call__(self, hidden: Tensor, weight: Tensor, batch: Batch, count: int, progress: float) -> HeadLoss:
        objective = self.schedule(progress)
        targets = batch.targets.to(hidden.device).flatten()
        distilling = objective.kd_weight > 0
        teacher = self.teacher.of_batch(batch, objective.temperature) if distilling else None
        return fused_head_loss(hidden, weight, targets, self.n_vocab, objective, teacher, count)

    def read(self, windows: np.ndarray, progress: float) -> Tensor | None:
        """What `Feed` reads ahead: records uint8 [N, itemsize] in main memory, where the loss will want any."""
        wanted = isinstance(self.teacher, TeacherCache) and self.schedule(progress).kd_weight > 0
        return self.teacher.read(windows) if wanted else None


def cross_entropy(n_vocab: int, z_loss: float) -> Loss:
    """The loss of `pretrain` and `continue`."""
    objective = Objective(z_loss=z_loss)
    return Distillation(n_vocab, lambda _: objective, teacher=None)


def on_policy(n_vocab: int, schedule: ObjectiveSchedule, minillm: MiniLLM) -> Loss:
    """(1 - alpha) cross-entropy on the windows + alpha MiniLLM on responses to their first tokens."""
    on_text = Distillation(n_vocab, schedule, teacher=None)

    def loss(hidden: Tensor, weight: Tensor, batch: Batch, count: int, progress: float) -> HeadLoss:
        alpha, text = schedule.alpha(progress), on_text(hidden, weight, batch, count, progress)
        if alpha == 0:
            return text
        sampled, share = minillm(batch), len(hidden) / count
        divergence = sampled.reverse_kl * len(hidden)
        return HeadLoss(text.loss + alpha * share * sampled.surrogate, text.cross_entropy, divergence)

    return loss
