"""The head and its loss alone, forward and backward, against full logits and against others' fused heads."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import forget_peak, peak_bytes, seconds_of
from bench.gpu.setting import Figures, Setting
from microlm.objective.divergences import Divergence, SparseTeacher
from microlm.objective.fused_head import fused_head_loss
from microlm.objective.schedule import Objective

HeadAndLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, D] bfloat16, weight [V, D] float32, targets [N]) -> mean cross-entropy."""
REPEATS = 5


def run(setting: Setting) -> Figures:
    for rows in setting.sizes.head_rows:
        for name, loss_of in _ours(setting).items():
            yield f"{name}, {rows:,} tokens", partial(measure, setting, loss_of, rows)
        for name, make in _others(setting).items():
            yield f"{name}, {rows:,} tokens", partial(_measure_other, setting, make, rows)


def _ours(setting: Setting) -> dict[str, HeadAndLoss]:
    n_vocab, top_k = setting.sizes.n_vocab, setting.config.at.teacher.top_k
    return {
        "fused head": partial(_cross_entropy, n_vocab),
        "fused head, cached rkl, lumped": partial(_distilled, n_vocab, top_k),
    }


def _others(setting: Setting) -> dict[str, Callable[[], HeadAndLoss]]:
    """By name, each made when its turn comes: this machine may lack it."""
    whole: dict[str, Callable[[], HeadAndLoss]] = {"full logits": lambda: _whole}
    if setting.runtime.compiled:
        whole["full logits, compiled"] = lambda: torch.compile(_whole, dynamic=False)
    return whole | {
        "F.linear_cross_entropy": lambda: _torchs(None),
        "F.linear_cross_entropy, chunked": lambda: _torchs("LinearCrossEntropyOptions"),
        "cut-cross-entropy": lambda: _cut(impl="cce"),
        "cut-cross-entropy, unfiltered": lambda: _cut(impl="cce", filter_eps=None),
        "cut-cross-entropy, kahan full c": lambda: _cut(impl="cce_kahan_full_c"),
        "Liger": _liger,
    }


def _measure_other(setting: Setting, make: Callable[[], HeadAndLoss], rows: int) -> dict[str, object]:
    """What another's code cannot do here is no failure of ours; why is told all the same."""
    try:
        return measure(setting, make(), rows)
    except Exception as error:
        return {"absent": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}


def measure(setting: Setting, loss_of: HeadAndLoss, rows: int) -> dict[str, object]:
    """ms of one pass forward and backward, and bytes that it holds beyond its inputs at the most."""
    device, shape = setting.device, setting.shape()
    drawn = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, shape.hidden_size, device=device, generator=drawn).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(shape.n_vocab, shape.hidden_size, device=device, generator=drawn)).requires_grad_()
    targets = torch.randint(0, shape.n_vocab, (rows,), device=device, generator=drawn)

    def both() -> Tensor:
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, weight, targets)
        loss.backward()
        return loss.detach()

    loss = float(both())
    hidden.grad = weight.grad = None
    held = forget_peak(device)
    ms = seconds_of(both, device, REPEATS) * 1e3
    memory = {"extra_bytes": peak_bytes() - held} if device.type == "cuda" else {}
    return {"ms": ms, **memory, "loss": loss}


def _cross_entropy(n_vocab: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fused_head_loss(hidden, weight, targets, n_vocab, Objective(), count=len(targets)).loss


def _distilled(n_vocab: int, k: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Half of it cross-entropy; the teacher's ids are evenly spread, from another place in each row."""
    device = hidden.device
    spread = torch.arange(k, device=device) * (n_vocab // k)
    ids = (spread + torch.arange(len(targets), device=device)[:, None]) % n_vocab
    log_p = torch.full((len(targets), k + 1), 1 / (k + 1), device=device).log()
    objective = Objective(0.5, 0.5, Divergence("rkl"))
    return fused_head_loss(hidden, weight, targets, n_vocab, objective, SparseTeacher(ids, log_p), len(targets)).loss


def _whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets)


def _torchs(options: str | None) -> HeadAndLoss:
    """Of PyTorch 2.13 and newer."""
    function, chosen = F.linear_cross_entropy, options and getattr(torch.nn, options)()
    return lambda hidden, weight, targets: function(hidden, weight.to(hidden.dtype), targets, options=chosen)


def _cut(**how: object) -> HeadAndLoss:
    """Wijmans et al. 2024, arXiv:2411.09009."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight.to(hidden.dtype), targets, **how)


def _liger() -> HeadAndLoss:
    """Hsu et al. 2024, arXiv:2410.10989."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: function(weight.to(hidden.dtype), hidden, targets)
