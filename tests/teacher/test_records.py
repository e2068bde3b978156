"""A record's bytes: what goes in comes out, and what is rounded is rounded as far as is said."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microlm.teacher.cache import CacheIdentity
from microlm.teacher.records import LARGEST_DROP, UNIT, RecordLayout, code_rounding, decode, encode
from tests.support.toy_records import record_of

KINDS = st.sampled_from(["full", "compact"])
LAYOUTS = st.builds(
    RecordLayout, KINDS, st.sampled_from([40, 2**16, 2**16 + 1]), st.integers(1, 40), st.integers(1, 3), st.booleans()
)


def falling(shape: tuple[int, ...], seed: int, spread: float) -> torch.Tensor:
    """Log-probabilities that do not rise along the last dimension, none above 0."""
    drops = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * spread
    return -drops.cumsum(-1)


def columns_of(layout: RecordLayout, n: int, seed: int) -> dict[str, torch.Tensor | None]:
    draws = torch.Generator().manual_seed(seed)
    head = (n, layout.temperatures, layout.top_k) if layout.projected else (n, layout.top_k)
    return {
        "ids": torch.randint(layout.n_vocab, head, generator=draws),
        "log_p": falling(head, seed, 4.0),
        "log_tail": torch.randn(n, layout.temperatures, generator=draws),
        "covered": torch.rand(n, generator=draws) < 0.5 if layout.projected else None,
    }


@given(layout=LAYOUTS, n=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_columns_come_back_exact_but_for_the_stated_rounding(layout: RecordLayout, n: int, seed: int) -> None:
    given_columns = columns_of(layout, n, seed)
    rows = layout.pack(**given_columns)
    assert rows.shape == (n, layout.itemsize) and rows.dtype == torch.uint8
    found = layout.unpack(rows)
    assert torch.equal(found.ids, given_columns["ids"]) and torch.equal(found.log_tail, given_columns["log_tail"])
    if layout.projected:
        assert torch.equal(found.covered, given_columns["covered"])
    else:
        assert found.covered is None
    error = (found.log_p - given_columns["log_p"]).abs()
    assert (error <= found.rounding + 1e-4).all()  # float32 of the sum itself, where it is some dozens of nats
    assert found.rounding.isfinite().all()


@given(layout=LAYOUTS, n=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_another_reader_of_the_bytes_finds_the_same(layout: RecordLayout, n: int, seed: int) -> None:
    temperatures = tuple(float(1 + i) for i in range(layout.temperatures))
    foreign = {"teacher_tokenizer": "another"} if layout.projected else {}
    identity = CacheIdentity(
        "", None, "", layout.n_vocab, "", 1, 1, layout.top_k, temperatures, record=layout.kind, **foreign
    )
    assert identity.layout == layout
    given_columns = columns_of(layout, n, seed)
    records = layout.pack(**given_columns).numpy().view(record_of(identity))[:, 0]
    assert np.array_equal(records["ids"], given_columns["ids"].numpy())
    assert np.array_equal(records["log_tail"], given_columns["log_tail"].numpy())
    if layout.kind == "compact":
        assert np.array_equal(records["code"], encode(given_columns["log_p"]).numpy())
    else:
        assert np.array_equal(records["log_p"], given_columns["log_p"].half().numpy())


@given(k=st.integers(1, 64), seed=st.integers(0, 2**31), spread=st.floats(1e-4, 15.9))
def test_a_byte_says_a_log_probability_within_half_a_step(k: int, seed: int, spread: float) -> None:
    log_p = falling((7, k), seed, spread)
    code = encode(log_p)
    decoded, steps = decode(code), (2 * code.double() + 1) * UNIT
    # its own half step, or that of the byte before it which it fell short of
    error, slack = (decoded - log_p).abs(), 1e-5 * (1 + log_p.abs())
    assert (error[:, :-1] <= code_rounding(code)[:, :-1] + slack[:, :-1]).all()
    if k > 1:
        largest = torch.where(code > 0, steps / 2, UNIT / 2).cummax(-1).values
        assert (error[:, :-1] <= largest[:, :-1] + slack[:, :-1]).all()
    assert torch.equal(decoded.sort(-1, descending=True).values, decoded)


@given(k=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_no_token_outside_can_be_likelier_than_the_last_one_says(k: int, seed: int) -> None:
    log_p = falling((9, k), seed, 6.0)
    decoded = decode(encode(log_p))
    previous = decoded[:, -2] if k > 1 else torch.zeros(9)
    # never below what it was, but where it cannot be said otherwise: no value lies above the one before it
    assert (decoded[:, -1] >= torch.minimum(log_p[:, -1], previous) - 1e-4).all()


@given(code=st.lists(st.integers(0, 254), min_size=1, max_size=40))
def test_what_was_decoded_is_coded_as_it_was(code: list[int]) -> None:
    code = torch.tensor(code, dtype=torch.uint8)[None]
    again = decode(encode(decode(code)))
    tolerance = 1e-6 * decode(code).abs() + UNIT  # float32 of tens of nats is coarser than a unit
    assert ((again - decode(code)).abs() <= tolerance + code_rounding(code) * (decode(code).abs() > 20)).all()


def test_a_drop_larger_than_a_byte_says_goes_on_in_the_next() -> None:
    log_p = torch.tensor([[-1.0, -1.0 - LARGEST_DROP - 5, -30.0, -30.5]])
    code = encode(log_p)
    assert code[0, 1] == 255 and math.isinf(code_rounding(code)[0, 1])
    assert decode(code)[0, 2] == pytest.approx(-30.0, abs=0.1)


def test_nothing_said_is_the_largest_probability_and_is_told_by_its_tail() -> None:
    # a projected position that is not covered: NaN all along
    layout = RecordLayout("compact", 40, 3, 1, True)
    rows = layout.pack(
        torch.zeros(1, 1, 3, dtype=torch.int64),
        torch.full((1, 1, 3), torch.nan),
        torch.full((1, 1), torch.nan),
        torch.zeros(1, dtype=torch.bool),
    )
    found = layout.unpack(rows)
    assert found.log_tail.isnan().all() and not found.covered.any()


def test_bytes_of_the_scales_records() -> None:
    assert RecordLayout("compact", 50_280, 42, 2, False).itemsize + 4 == 138
    assert RecordLayout("full", 50_280, 64, 2, False).itemsize + 4 == 268
