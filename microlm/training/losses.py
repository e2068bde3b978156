"""What the trainings minimize, as the training loop takes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
from microlm.corpus.shards import TokenShards
from microlm.models.student import StudentLM
from microlm.objective.divergences import Divergence
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


def distances(
    model: StudentLM, teacher: TeacherCache | LiveTeacher, shards: TokenShards, windows: np.ndarray, rows: int
) -> dict[str, float]:
    """Forward and reverse KL between the teacher and `model` on `windows`, nats per position that the teacher covers.

    From below, with the tail as one (Cover and Thomas, the data processing inequality), by little where the cached ids
    hold nearly all of the mass.
    """
    found = dict.fromkeys(("fkl", "rkl"), 0.0)
    covered, device = 0, model.head_weight.device
    with torch.no_grad():  # no inference mode: the head keeps its memory for the training that follows
        for start in range(0, len(windows), rows):
            batch = read_batch(shards, windows[start : start + rows], teacher.identity.seq_len)
            batch = replace(batch, rows=batch.rows.to(device))
            hidden, said = model.hidden(batch.tokens).flatten(0, 1), teacher.of_batch(batch, 1.0)
            covered += len(hidden) if said.covered is None else int(said.covered.sum())
            for name in found:
                asked = Objective(0.0, 1.0, Divergence(name, math.nan))
                of = fused_head_loss(hidden, model.head_weight, batch.targets.flatten(), model.n_vocab, asked, said)
                found[name] += float(of.divergence)
    return {name: total / max(1, covered) for name, total in found.items()}


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
