"""A sub-network of a model: some of its layers, some of each width, the weights as they are.

One choice of residual dimensions serves every matrix that reads or writes the residual stream, so that the stream means
the same in all layers (Samragh et al. 2023, "Weight subcloning", arXiv:2312.09299). Heads go in whole groups, a head of
keys and values with the queries that it serves. Heads and MLP neurons are each layer's own.

Shapes: L layers, D hidden size, K heads of keys and values, I MLP neurons.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microlm.models.student import StudentLM


@dataclass(frozen=True)
class Kept:
    """Places in the whole model, ascending; the last two are of the layers in `layers`, in their order."""

    layers: tuple[int, ...]
    hidden: Tensor  # int64 [d]
    groups: tuple[Tensor, ...]  # int64 [k] each
    neurons: tuple[Tensor, ...]  # int64 [i] each


def everything(model: StudentLM) -> Kept:
    """What leaves the model as it is."""
    shape = model.shape
    layers = tuple(range(shape.layers))
    return Kept(
        layers,
        torch.arange(shape.hidden_size),
        tuple(torch.arange(shape.kv_heads) for _ in layers),
        tuple(torch.arange(shape.intermediate_size) for _ in layers),
    )


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
}
_NORMS_OF_ALL_HEADS = {"q_norm": "queries", "k_norm": "keys"}


def cut(model: StudentLM, kept: Kept) -> StudentLM:
    """A new student of the places in `kept`, in the model's family, with copies of its weights."""
    shape = model.shape
    group = shape.heads // shape.kv_heads
    student = StudentLM(
        replace(
            shape,
            layers=len(kept.layers),
            hidden_size=len(kept.hidden),
            heads=len(kept.groups[0]) * group,
            kv_heads=len(kept.groups[0]),
            intermediate_size=len(kept.neurons[0]),
        ),
        seed=None,
    )
    whole, state = model.state_dict(), {}
    for name in student.state_dict():
        places = {"hidden": kept.hidden}
        source = name
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            source = f"model.layers.{kept.layers[int(index)]}.{rest}"
            groups, neurons = kept.groups[int(index)], kept.neurons[int(index)]
            places |= {
                "neurons": neurons,
                "keys": _spread(groups, shape.head_dim),
                "queries": _spread(groups, group * shape.head_dim),
            }
        tensor = whole[source]
        for axis, kind in enumerate(_axes(name, shape.kind.qk_norm)):
            if kind:
                tensor = tensor.index_select(axis, places[kind])
        state[name] = tensor
    student.load_state_dict(state)
    return student


def _axes(name: str, qk_norm: str) -> tuple[str, ...]:
    module, kind = name.split(".")[-2:]
    if module in _AXES:
        return _AXES[module] if kind == "weight" else _AXES[module][:1]
    if module in _NORMS_OF_ALL_HEADS:
        return (_NORMS_OF_ALL_HEADS[module],) if qk_norm == "whole" else ("",)
    return ("hidden",)  # any other norm is of the residual stream


def _spread(groups: Tensor, size: int) -> Tensor:
    """Rows of the heads in `groups`, `size` rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
