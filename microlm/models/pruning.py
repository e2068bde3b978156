"""A student out of its teacher: what a model can spare, and the sub-network that stays, its weights as they are.

Width follows the size of activations on a few windows of text (Muralidharan et al. 2024, "Minitron", arXiv:2407.14679,
section 2.2). Depth follows one of two measures: a layer's influence, how far it turns the residual stream (Men et al.
2024, "ShortGPT", arXiv:2403.03853, equation 1), which one pass gives for all of them; or the loss without the layer,
dearer and exact, one layer after the other.

One choice of residual dimensions serves every matrix that reads or writes the residual stream, so that the stream means
the same in all layers (Samragh et al. 2023, "Weight subcloning", arXiv:2312.09299). Heads go in whole groups, a head of
keys and values with the queries that it serves. Heads and MLP neurons are each layer's own.

Shapes: W windows of T tokens, L layers, D hidden size, K heads of keys and values, I MLP neurons.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microlm.corpus.batches import Batch
from microlm.models.student import Block, RMSNorm, StudentLM


@dataclass(frozen=True)
class Importance:
    """Larger is more important. All float64."""

    layers: Tensor  # [L], 1 - cosine of a block's input and output, mean over tokens
    hidden: Tensor  # [D], mean magnitude of what the norms of the residual stream give, over all of them
    groups: Tensor  # [L, K], mean norm of a head's attention output, summed over a group's heads
    neurons: Tensor  # [L, I], mean magnitude of what the MLP's last matrix is given


@torch.inference_mode()
def importance(model: StudentLM, batch: Batch) -> Importance:
    """One forward pass over the windows of `batch`."""
    shape, trunk = model.shape, model.model
    layers = shape.layers
    sizes = layers, shape.hidden_size, (layers, shape.kv_heads), (layers, shape.intermediate_size)
    found = Importance(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def block(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.layers[index] = 1 - F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).double().mean()

    def attended(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0].float().unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
        found.groups[index] = heads.norm(dim=-1).sum(-1).double().mean((0, 1))

    def gated(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.neurons[index] = inputs[0].float().abs().double().mean((0, 1))

    def normed(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        found.hidden.add_(output.float().abs().double().mean((0, 1)))

    was_training = model.training
    with ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        for index, layer in enumerate(trunk.layers):
            hooks.enter_context(layer.register_forward_hook(partial(block, index)))
            hooks.enter_context(layer.self_attn.o_proj.register_forward_pre_hook(partial(attended, index)))
            hooks.enter_context(layer.mlp.down_proj.register_forward_pre_hook(partial(gated, index)))
        for name, module in trunk.named_modules():
            if isinstance(module, RMSNorm) and "self_attn" not in name:
                hooks.enter_context(module.register_forward_hook(normed))
        model.eval().hidden(batch.tokens.to(model.head_weight.device))
    return found


def most_important(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest, ascending, int64 [keep]; among equals the first."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


@torch.inference_mode()
def by_loss(
    model: StudentLM,
    batch: Batch,
    keep: int,
    token_nats: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    progress: Callable[[int], object] = int,
) -> tuple[tuple[int, ...], list[tuple[int, float]]]:
    """Take out one layer after the other, each time that without which the loss is least; among equals the first.

    A try runs the layers behind the one that is left out; those before it are not run again. To take n of L layers out
    costs about n (L - n / 2)^2 / 2 passes of a block.

    Args:
        token_nats: as in objective/fused_head.py.
        progress: told each try.

    Returns:
        The layers kept, ascending, and for each layer taken out, in order, the loss without it, nats per token.
    """
    model = model.eval()
    tokens, targets = batch.tokens.to(model.head_weight.device), batch.targets.to(model.head_weight.device).flatten()

    def run(x: Tensor, layers: list[int]) -> Tensor:
        for index in layers:
            x = Block.forward(model.model.layers[index], x, cos, sin, None)
        return x

    left, removed = list(range(model.shape.layers)), []
    while len(left) > keep:
        (x, cos, sin), losses = model.embedded(tokens), []
        for place, index in enumerate(left):
            hidden = model.model.norm(run(x, left[place + 1 :])).flatten(0, 1)
            losses.append(token_nats(hidden, model.head_weight, targets, model.n_vocab).double().mean().item())
            x = run(x, [index])
            progress(1)
        place = losses.index(min(losses))
        removed.append((left.pop(place), losses[place]))
    return tuple(left), removed


def tries(layers: int, keep: int) -> int:
    """How often `by_loss` asks for a loss."""
    return sum(range(keep + 1, layers + 1))


@dataclass(frozen=True)
class Kept:
    """Places in the whole model, ascending; the last two are of the layers in `layers`, in their order."""

    layers: tuple[int, ...]
    hidden: Tensor  # int64 [d]
    groups: tuple[Tensor, ...]  # int64 [k] each
    neurons: tuple[Tensor, ...]  # int64 [i] each


# which places each axis of a tensor is cut by; a name is looked up by its last module
_AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("", "hidden"),
    "lm_head": ("", "hidden"),
    "q_proj": ("queries", "hidden"),
    "k_proj": ("keys", "hidden"),
    "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "queries"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"),
    "q_norm": ("queries",),
    "k_norm": ("keys",),
}


def cut(model: StudentLM, kept: Kept) -> StudentLM:
    """A new student of the places in `kept`, in the model's family, with copies of its weights."""
    shape, kv_heads = model.shape, len(kept.groups[0])
    group = shape.heads // shape.kv_heads
    sizes = {"layers": len(kept.layers), "hidden_size": len(kept.hidden), "intermediate_size": len(kept.neurons[0])}
    student = StudentLM(replace(shape, **sizes, heads=kv_heads * group, kv_heads=kv_heads), seed=None)
    whole, state = model.state_dict(), {}
    for name in student.state_dict():
        places, source = {"hidden": kept.hidden}, name
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            source, groups = f"model.layers.{kept.layers[int(index)]}.{rest}", kept.groups[int(index)]
            places |= {"keys": _spread(groups, shape.head_dim), "queries": _spread(groups, group * shape.head_dim)}
            places["neurons"] = kept.neurons[int(index)]
        tensor = whole[source]
        for axis, kind in enumerate(_axes(name, shape.kind.qk_norm)):
            if kind:
                tensor = tensor.index_select(axis, places[kind])
        state[name] = tensor
    student.load_state_dict(state)
    return student


def _axes(name: str, qk_norm: str) -> tuple[str, ...]:
    module, kind = name.split(".")[-2:]
    if qk_norm == "head" and module in ("q_norm", "k_norm"):  # the same of every head
        return ("",)
    axes = _AXES.get(module, ("hidden",))  # any other norm is of the residual stream
    return axes if kind == "weight" else axes[:1]


def _spread(groups: Tensor, size: int) -> Tensor:
    """Rows of the heads in `groups`, `size` rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def principal_embedding(embedding: Tensor, size: int) -> tuple[Tensor, float]:
    """A student's embedding out of its teacher's (GUIDE, arXiv:2510.06502): coordinates of each row along the `size`
    directions that hold most of the rows' squared length.

    Inner products of rows, which a tied head and attention live on, are kept as well as any `size` dimensions can
    (Eckart and Young 1936). The mean is not taken out: it is part of every logit. Signs are fixed by each direction's
    largest entry, so that the result does not depend on the library's choice.

    Args:
        embedding: float [V, D].
        size: d, at most D.

    Returns:
        float32 [V, d], and the share of the squared length that it holds.
    """
    rows = embedding.double()
    lengths, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    chosen = directions[:, -size:].flip(-1)
    chosen = chosen * chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()
    return (rows @ chosen).float(), float(lengths[-size:].sum() / lengths.sum())
