"""Optimizers and learning-rate schedules.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves the blocks' matrices, AdamW (Loshchilov and
Hutter 2019, arXiv:1711.05101) the embedding and the norms' gains.
"""

import math

import torch
from torch import Tensor, nn

from microlm.config import OptimizationConfig

ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
MUON_MOMENTUM = 0.95


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("model.layers.") and parameter.ndim == 2


class Optimizers:
    """All optimizers of one training. Every parameter is in exactly one group of one of them."""

    def __init__(self, model: nn.Module, config: OptimizationConfig) -> None:
        named = dict(model.named_parameters())
        matrices = {n: p for n, p in named.items() if is_block_matrix(n, p)}
        others = {n: p for n, p in named.items() if n not in matrices}
        fused = True if next(iter(named.values())).device.type in ("cpu", "cuda") else None
        adamw_groups = [{"params": list(others.values()), "weight_decay": 0.0}]
        self._all: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            muon = torch.optim.Muon(
                list(matrices.values()),
                lr=config.muon_learning_rate,
                momentum=MUON_MOMENTUM,
                weight_decay=config.weight_decay,
            )
            self._all.append(muon)
        else:
            adamw_groups.append({"params": list(matrices.values()), "weight_decay": config.weight_decay})
        self._all.append(
            torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, fused=fused)
        )
        self._groups = [group for optimizer in self._all for group in optimizer.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        self._names = {id(p): n for n, p in named.items()}
        held = [id(p) for group in self._groups for p in group["params"]]
        assert sorted(held) == sorted(self._names), "every parameter is optimized exactly once"

    @property
    def learning_rate(self) -> float:
        """Of the first group."""
        return self._groups[0]["lr"]

    def step(self, multiplier: float) -> None:
        """One update at `multiplier` times the peak learning rates; gradients are gone afterwards."""
        for group, peak in zip(self._groups, self._peaks):
            group["lr"] = peak * multiplier
        for optimizer in self._all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and counts by `<parameter>/<name>`; learning rates follow from the step and are not state."""
        return {
            f"{self._names[id(parameter)]}/{key}": value
            for optimizer in self._all
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave. KeyError where a parameter is not of this model."""
        by_name = {name: identity for identity, name in self._names.items()}
        owners = {id(p): (o, p) for o in self._all for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, state = key.rpartition("/")
            optimizer, parameter = owners[by_name[name]]
            moved = value.clone() if state == "step" else value.to(parameter.device).clone()
            optimizer.state[parameter][state] = moved


def learning_rate_multiplier(config: OptimizationConfig, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at `step` of 0 .. steps - 1."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = round(config.decay_fraction * steps)
        falling = min(1.0, (steps - step) / max(1, decay))  # flat until the last `decay` steps, then linear
    return config.final_fraction + (1 - config.final_fraction) * falling
