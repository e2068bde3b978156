"""What a model can spare, measured on a few windows of text.

Width follows the size of activations (Muralidharan et al. 2024, "Minitron", arXiv:2407.14679, section 2.2). Depth
follows one of two measures: a layer's influence, how far it turns the residual stream (Men et al. 2024, "ShortGPT",
arXiv:2403.03853, equation 1), which one pass gives for all of them; or the loss without the layer, dearer and exact,
one layer after the other.

Shapes: W windows of T tokens, L layers, D hidden size, K heads of keys and values, I MLP neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    found = Importance(
        torch.zeros(shape.layers, dtype=torch.float64),
        torch.zeros(shape.hidden_size, dtype=torch.float64),
        torch.zeros(shape.layers, shape.kv_heads, dtype=torch.float64),
        torch.zeros(shape.layers, shape.intermediate_size, dtype=torch.float64),
    )

    def block(index: int) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.layers[index] = 1 - F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).double().mean()

        return see

    def attended(index: int) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            heads = inputs[0].float().unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
            found.groups[index] = heads.norm(dim=-1).sum(-1).double().mean((0, 1))

        return see

    def gated(index: int) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.neurons[index] = inputs[0].float().abs().double().mean((0, 1))

        return see

    def normed(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        found.hidden.add_(output.float().abs().double().mean((0, 1)))

    hooks = []
    for index, layer in enumerate(trunk.layers):
        hooks.append(layer.register_forward_hook(block(index)))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(attended(index)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(gated(index)))
    for name, module in trunk.named_modules():
        if isinstance(module, RMSNorm) and "self_attn" not in name:
            hooks.append(module.register_forward_hook(normed))
    was_training = model.training
    try:
        model.eval().hidden(batch.tokens.to(model.head_weight.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return found


def most_important(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest, ascending, int64 [keep]; among equals the first."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def by_influence(scores: Tensor, keep: int) -> tuple[int, ...]:
    """The `keep` layers that turn the residual stream most. scores: [L]."""
    return tuple(most_important(scores, keep).tolist())


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
    cos, sin = (turn[None, : tokens.shape[1]].to(model.activation_dtype) for turn in (model.cos, model.sin))

    def run(x: Tensor, layers: list[int]) -> Tensor:
        for index in layers:
            x = Block.forward(model.model.layers[index], x, cos, sin, None)
        return x

    left, removed = list(range(model.shape.layers)), []
    while len(left) > keep:
        x, losses = model.model.embed_tokens(tokens).to(model.activation_dtype), []
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
