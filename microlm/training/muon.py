"""Muon for a GPU: the arithmetic of `torch.optim.Muon`, with matrices of one shape orthogonalized together.

`torch.optim.Muon` takes one matrix after another. At 124M that is 84 times some 32 kernels, most of which end sooner
than the next one can be launched. Here a shape takes about 40, however many matrices it has.

Shapes: n matrices of r rows and c columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Muon

STATE = "momentum_buffer"  # as `torch.optim.Muon` names it


class BatchedMuon(Muon):
    """Takes the arguments, keeps the state and gives the updates of `torch.optim.Muon`, up to rounding: the sums of a
    batched product may be in another order. Nothing here waits for the device.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        assert closure is None, "a closure is for optimizers that ask for the loss again"
        for group in self.param_groups:
            for matrices in _alike(group["params"]):
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict) -> None:
        """`matrices` are of one shape."""
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        directions = orthogonalized(
            torch.stack(updates).bfloat16(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        # float32 and contiguous, as the weights are: of mixed lists every pair would get a kernel of its own
        wide = directions.to(matrices[0].dtype, memory_format=torch.contiguous_format)
        rate = adjusted_rate(group["lr"], group["adjust_lr_fn"], *matrices[0].shape)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(wide.unbind()), alpha=-rate)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if STATE not in state:
            state[STATE] = torch.zeros_like(matrix.grad)
        return state[STATE]


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that have a gradient, by shape, each shape's in order."""
    found: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            found[tuple(parameter.shape)].append(parameter)
    yield from found.values()


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """[n, r, c] -> roughly the nearest semi-orthogonal matrices, by Newton and Schulz's iteration.

    Overwrites `x`. Singular values end between about 0.7 and 1.2.
    """
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps))  # spectral norms are at most 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adjusted_rate(rate: float, adjustment: str | None, rows: int, columns: int) -> float:
    """As `torch.optim.Muon` has it: by default updates of tall matrices are larger."""
    if adjustment in (None, "original"):
        return rate * math.sqrt(max(1, rows / columns))
    return rate * 0.2 * math.sqrt(max(rows, columns))  # match_rms_adamw
