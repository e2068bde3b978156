"""Attention after a past and without one: what has no need of a mask gets none, and not a bit differs on the CPU."""

import pytest
import torch
from torch import Tensor

from microlm.models.architecture import ModelShape
from microlm.models.student import Attention

SHAPE = ModelShape(70, 128, 1, 32, 2, 16, 64, context=96, rope_theta=1e4)


def attended(length: int, before: int, dtype: torch.dtype, masked: bool) -> Tensor:
    """`length` positions after `before` others, with the causal mask written out or left to it."""
    drawn = torch.Generator().manual_seed(length)
    attention = Attention(SHAPE)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.3, generator=drawn)
    x = torch.randn(3, before + length, 32, generator=drawn).to(dtype)
    turn = torch.randn(2, 1, before + length, 16, generator=drawn).to(dtype)
    past, mask = None, None
    with torch.inference_mode():
        if before:
            _, past = attention(x[:, :before], *turn[:, :, :before], None)
        if masked:
            mask = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        found, _ = attention(x[:, before:], *turn[:, :, before:], past, mask)
        if not before:
            assert torch.equal(found, attention(x, *turn, None)[0])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [0, 1, 5, 40])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33, 50])
def test_it_is_the_attention_under_a_mask_bit_for_bit(length: int, before: int, dtype: torch.dtype) -> None:
    assert torch.equal(attended(length, before, dtype, True), attended(length, before, dtype, False))
