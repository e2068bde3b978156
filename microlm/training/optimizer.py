"""Optimizers and learning-rate schedules.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves the blocks' matrices, AdamW (Loshchilov and
Hutter 2019, arXiv:1711.05101) the embedding and the norms' gains.

Of several processes each orthogonalizes the matrices dealt to it, holds their momentum alone, and sends the others what
became of them. AdamW, whose steps cost nothing, is done by all alike.

Shapes: n matrices of r rows and c columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from microlm.parameters import OptimizationConfig
from microlm.runtime import distributed

ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
MUON_MOMENTUM = 0.95
STATE = "momentum_buffer"  # as `torch.optim.Muon` names it


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("model.layers.") and parameter.ndim == 2


def deal_matrices(matrices: dict[str, nn.Parameter], processes: int) -> dict[str, int]:
    """Which process orthogonalizes each: largest first, to the one with the least work so far (m n min(m, n))."""
    work = {name: p.numel() * min(p.shape) for name, p in matrices.items()}
    loads, owners = [0] * processes, {}
    for name in sorted(work, key=lambda name: (-work[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += work[name]
    return owners


class BatchedMuon(Muon):
    """The arithmetic of `torch.optim.Muon`, for a GPU: matrices of one shape are orthogonalized together.

    `torch.optim.Muon` takes one matrix after another. At 124M that is 84 times some 32 kernels, most of which end
    sooner than the next one can be launched. Here a shape takes about 40, however many matrices it has.

    It takes the arguments, keeps the state and gives the updates of `torch.optim.Muon`, up to rounding: the sums of a
    batched product may be in another order. Nothing here waits for the device.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        assert closure is None, "a closure is for optimizers that ask for the loss again"
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict) -> None:
        """`matrices` are of one shape."""
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if STATE not in self.state[matrix]:
                self.state[matrix][STATE] = torch.zeros_like(matrix.grad)
        momenta = [self.state[matrix][STATE] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        directions = orthogonalized(
            torch.stack(updates).bfloat16(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        # float32 and contiguous, as the weights are: of mixed lists every pair would get a kernel of its own
        wide = directions.to(matrices[0].dtype, memory_format=torch.contiguous_format)
        rows, columns = matrices[0].shape
        larger = math.sqrt(max(1, rows / columns))  # by default updates of tall matrices are larger
        if group["adjust_lr_fn"] == "match_rms_adamw":
            larger = 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(wide.unbind()), alpha=-group["lr"] * larger)


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


MOMENTS = {Muon: 1, BatchedMuon: 1, AdamW: 2}  # tensors of a parameter's shape in the state


class Optimizers:
    """All optimizers of one training. Every parameter is in exactly one group of one of them."""

    def __init__(self, model: nn.Module, config: OptimizationConfig) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        matrices = {name: p for p, name in self._names.items() if is_block_matrix(name, p)}
        device = next(iter(self._names)).device.type
        fused = True if device in ("cpu", "cuda") else None
        others = [p for p, name in self._names.items() if name not in matrices]
        adamw_groups = [{"params": others, "weight_decay": 0.0}]
        self._all: list[torch.optim.Optimizer] = []
        self._dealt: dict[str, tuple[nn.Parameter, int]] = {}  # matrices and their processes, where there are several
        if config.optimizer == "muon":
            owners = deal_matrices(matrices, distributed.size())
            if distributed.size() > 1:
                self._dealt = {name: (matrix, owners[name]) for name, matrix in matrices.items()}
            mine = [matrix for name, matrix in matrices.items() if owners[name] == distributed.rank()]
            if mine:
                muon = BatchedMuon if device == "cuda" else Muon  # a CPU has no launches to save
                rate, decay = config.muon_learning_rate, config.weight_decay
                self._all.append(muon(mine, lr=rate, momentum=MUON_MOMENTUM, weight_decay=decay))
        else:
            adamw_groups.append({"params": list(matrices.values()), "weight_decay": config.weight_decay})
        self._all.append(AdamW(adamw_groups, lr=config.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, fused=fused))
        self._peaks = [group["lr"] for group in self._groups]
        held = [p for group in self._groups for p in group["params"]]
        held += [p for p, owner in self._dealt.values() if owner != distributed.rank()]
        assert sorted(map(id, held)) == sorted(map(id, self._names)), "every parameter is optimized exactly once"

    @property
    def _groups(self) -> list[dict]:
        return [group for optimizer in self._all for group in optimizer.param_groups]

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
        for parameter in self._names:
            parameter.grad = None
        self._exchange()

    def _exchange(self) -> None:
        """Send the others this process's matrices, and take theirs: one message an owner."""
        by_owner: dict[int, list[Tensor]] = defaultdict(list)
        for matrix, owner in self._dealt.values():
            by_owner[owner].append(matrix.detach())
        sent = []
        for owner, matrices in by_owner.items():
            count = sum(matrix.numel() for matrix in matrices)
            mine = owner == distributed.rank()
            flat = torch.cat([m.flatten() for m in matrices]) if mine else matrices[0].new_empty(count)
            sent.append((dist.broadcast(flat, owner, async_op=True), flat, [] if mine else matrices))
        for work, flat, matrices in sent:
            work.wait()
            if matrices:
                parts = flat.split([matrix.numel() for matrix in matrices])
                torch._foreach_copy_(matrices, [part.view_as(m) for part, m in zip(parts, matrices)])

    @contextmanager
    def room_for_state(self) -> Iterator[int]:
        """Hold as much memory as the moments that the next step would add to what is there; yields its bytes."""
        held = [
            torch.empty_like(parameter)
            for optimizer in self._all
            for parameter in _parameters_of(optimizer)
            if not optimizer.state.get(parameter)
            for _ in range(MOMENTS[type(optimizer)])
        ]
        yield sum(tensor.nbytes for tensor in held)
        held.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and counts by `<parameter>/<name>`; learning rates follow from the step and are not state.

        Every process has to call it; the first one gets them all.
        """
        found, held = {}, {p: state for optimizer in self._all for p, state in optimizer.state.items()}
        if self._dealt and distributed.any_rank(bool(held)):
            for name, (matrix, owner) in self._dealt.items():
                momentum = held[matrix][STATE] if owner == distributed.rank() else torch.empty_like(matrix)
                dist.broadcast(momentum, owner)
                if distributed.is_first():
                    found[f"{name}/{STATE}"] = momentum.detach()
        return found | {f"{self._names[p]}/{key}": value for p, state in held.items() for key, value in state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, of any number of processes; the momentum of others' matrices is left.

        KeyError where a parameter is not of this model.
        """
        by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            name, _, state = key.rpartition("/")
            by_name[name][state] = value
        if foreign := by_name.keys() - set(self._names.values()):
            raise KeyError(min(foreign))
        for optimizer in self._all:
            states = {
                index: {state: _copied(state, value, parameter) for state, value in by_name[name].items()}
                for index, parameter in enumerate(_parameters_of(optimizer))
                if (name := self._names[parameter]) in by_name
            }
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copied(state: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A count goes where its optimizer wants it, which `load_state_dict` knows: to the device for a fused kernel."""
    return value.clone() if state == "step" else value.to(parameter.device, copy=True)


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
