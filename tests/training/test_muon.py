"""Muon in batches is torch's Muon: the same updates up to rounding, the same state, in a number of kernels that does
not grow with the layers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from microlm.training.optimizer import BatchedMuon

SHAPES = ((24, 24), (64, 24), (24, 64), (8, 40), (1, 16), (16, 1))
# a direction is a product of bfloat16 numbers: its entries are off by a few of their last bits, 2^-8 of the largest
ROUNDING = 0.02
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.02, 0.3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "momentum": st.sampled_from([0.0, 0.95]),
        "nesterov": st.booleans(),
        "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
    }
)


def matrices(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    drawn = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=drawn)


def assert_alike(ours: list[nn.Parameter], theirs: list[nn.Parameter], before: list[Tensor]) -> None:
    """Within rounding of what the updates have moved."""
    for a, b, start in zip(ours, theirs, before, strict=True):
        moved = (b.detach() - start).abs().max().item()
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=ROUNDING * moved)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=7), OPTIONS)
def test_several_updates_are_those_of_torch(shapes: list[tuple[int, int]], options: dict) -> None:
    ours, theirs = matrices(shapes), matrices(shapes)
    batched, plain = BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    before = [parameter.detach().clone() for parameter in ours]
    for step in range(3):
        for parameters, optimizer in ((ours, batched), (theirs, plain)):
            give_gradients(parameters, step)
            optimizer.step()
        for a, b in zip(ours, theirs):
            assert torch.equal(batched.state[a]["momentum_buffer"], plain.state[b]["momentum_buffer"])
    assert_alike(ours, theirs, before)


@pytest.mark.parametrize(("first", "second"), [(BatchedMuon, torch.optim.Muon), (torch.optim.Muon, BatchedMuon)])
def test_either_goes_on_from_the_others_state(first: type, second: type) -> None:
    shapes = list(SHAPES) * 2
    whole, parted = matrices(shapes), matrices(shapes)
    before = [parameter.detach().clone() for parameter in whole]
    alone, begun, ended = torch.optim.Muon(whole), first(parted), second(parted)
    for step in range(4):
        if step == 2:
            assert begun.state_dict()["param_groups"] == ended.state_dict()["param_groups"]
            ended.load_state_dict(begun.state_dict())
        for parameters, optimizer in ((whole, alone), (parted, begun if step < 2 else ended)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_alike(parted, whole, before)


def test_a_parameter_without_a_gradient_stays_and_gets_no_state() -> None:
    moved, still = matrices([(24, 24), (24, 24)])
    optimizer, before = BatchedMuon([moved, still]), still.detach().clone()
    give_gradients([moved], 0)
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state and moved in optimizer.state


class Counting(TorchDispatchMode):
    """The operators that run; views start no kernel and are left out."""

    VIEWS = ("detach", "transpose", "t", "unbind", "view", "alias", "empty", "empty_like", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS and "record_function" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(kind: type[torch.optim.Optimizer], layers: int) -> list[str]:
    """Of one update, the second, of as many layers of the student."""
    parameters = matrices([(24, 24)] * 4 * layers + [(64, 24)] * 2 * layers + [(24, 64)] * layers)
    optimizer = kind(parameters)
    for step in range(2):
        give_gradients(parameters, step)
        with Counting() as counted:
            optimizer.step()
    return counted.names


def test_its_operators_do_not_grow_with_the_layers_and_none_asks_the_device() -> None:
    few, many = operators(BatchedMuon, 2), operators(BatchedMuon, 12)
    assert few == many and len(many) <= 3 * 25
    assert len(operators(torch.optim.Muon, 12)) > 20 * len(many)
    assert not {"_local_scalar_dense", "nonzero", "item"} & set(many)
