"""The mean of a training's last weights, which is what stays of it where that is asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from microlm.parameters import OptimizationConfig


class Average:
    """An exponential moving average of the weights after each step; the model itself where none is asked.

    Of the first 1 / (1 - decay) steps it is the plain mean, so that the start's weights leave no trace and the decay
    needs no warmup (Polyak and Juditsky 1992; Karras et al. 2024, arXiv:2312.02696, for what the decay does).
    """

    def __init__(self, model: nn.Module, asked: OptimizationConfig) -> None:
        self._model, self._decay = model, asked.average_decay if asked.average == "ema" else None
        self._weights = [] if self._decay is None else [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count the model's weights in after its update number `step`, from 0."""
        if self._weights:
            share = 1 - min(self._decay, step / (step + 1))
            torch._foreach_lerp_(self._weights, [p.detach() for p in self._model.parameters()], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the average's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def take_over(self) -> None:
        """Leave the model with the average's weights, for good."""
        self._swap()
        self._weights = []

    def _swap(self) -> None:
        for parameter, mean in zip(self._model.parameters(), self._weights):
            parameter.data, mean.data = mean.data, parameter.data

    def state_tensors(self) -> dict[str, Tensor]:
        return {str(place): mean for place, mean in enumerate(self._weights)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """KeyError or RuntimeError where it is not this model's."""
        for name, mean in self.state_tensors().items():
            mean.copy_(state[name])
