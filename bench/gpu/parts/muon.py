"""The optimizers' update alone, and what share of a step it is."""

from dataclasses import replace

import torch

from bench.gpu.device import seconds_of
from bench.gpu.parts.steps import CROSS_ENTROPY, key_of
from bench.gpu.setting import Figures, Setting
from microlm.models.student import StudentLM
from microlm.training.optimizer import Optimizers

REPEATS = 5


def run(setting: Setting) -> Figures:
    for optimizer in ("muon", "adamw"):
        yield optimizer, lambda optimizer=optimizer: _measure(setting, optimizer)


def _measure(setting: Setting, optimizer: str) -> dict[str, float]:
    model = StudentLM(setting.shape()).to(setting.device)
    optimizers = Optimizers(model, replace(setting.config.at.pretrain, optimizer=optimizer))
    gradients = [1e-3 * torch.randn_like(parameter) for parameter in model.parameters()]

    def update() -> None:
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
        optimizers.step(1e-3)

    ms = seconds_of(update, setting.device, REPEATS, warm_up=2) * 1e3
    step = setting.book.figures("steps").get(key_of(CROSS_ENTROPY, setting.sizes.micro_batch_rows[0]), {})
    share = {"share_of_step": ms / step["step_ms"]} if "step_ms" in step and optimizer == "muon" else {}
    return {"ms": ms, **share}
