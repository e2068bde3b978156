"""Batches are a pure function of the step, and the same in every training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import Batches, cached_windows, evenly_spaced, uncached_windows, window_count
from microlm.errors import UserError
from microlm.parameters import BatchConfig
from tests.support.toy import toy_shards

CONFIG = BatchConfig(seq_len=16, batch_tokens=64, micro_batch_rows=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("corpus"), 70, tokens=900)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 9))
def test_every_window_is_seen_once_an_epoch(count, seed, rows):
    config = BatchConfig(seq_len=16, batch_tokens=16 * rows, micro_batch_rows=rows)
    windows = np.arange(count) * 3
    batches = Batches.__new__(Batches)
    batches.shards, batches.config, batches.seed, batches.windows, batches._order = (
        None,
        config,
        seed,
        windows,
        (-1, windows),
    )
    epochs = 3
    seen = np.concatenate([batches.of_step(step) for step in range(-(-epochs * count // rows))])
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == windows.tolist()


def test_steps_may_be_asked_for_in_any_order(shards):
    forward = Batches(shards, CONFIG, seed=1)
    backward = Batches(shards, CONFIG, seed=1)
    steps = list(range(40))
    wanted = [forward.of_step(step).tolist() for step in steps]
    assert [backward.of_step(step).tolist() for step in reversed(steps)] == wanted[::-1]
    assert Batches(shards, CONFIG, seed=2).of_step(0).tolist() != wanted[0]


def test_targets_are_the_next_tokens_and_windows_name_their_place(shards):
    parts = Batches(shards, CONFIG, seed=1).micro_batches(3)
    assert [len(part.tokens) for part in parts] == [2, 2]
    for part in parts:
        for window, tokens, targets in zip(part.windows, part.tokens, part.targets):
            assert tokens.tolist() == shards.read(int(window) * 16, 16).tolist()
            assert targets.tolist() == shards.read(int(window) * 16 + 1, 16).tolist()


@given(st.integers(1, 500), st.integers(1, 600))
def test_evenly_spaced_windows_are_distinct_ascending_and_in_range(available, wanted):
    windows = evenly_spaced(available, wanted)
    assert len(windows) == min(available, wanted)
    assert (np.diff(windows) > 0).all() and windows[0] >= 0 and windows[-1] < available


def test_the_control_and_its_continuations_share_no_window_and_miss_none(shards):
    cached, rest = cached_windows(shards, 16, 30), uncached_windows(shards, 16, 30)
    assert sorted([*cached, *rest]) == list(range(window_count(shards, 16)))
    with pytest.raises(UserError, match=r"pretrain.windows: uncached leaves no window"):
        uncached_windows(shards, 16, 10_000)


def test_a_split_shorter_than_a_window_is_refused(shards):
    with pytest.raises(UserError, match=r"fewer than one window of batch.seq_len=901"):
        window_count(shards, 901)
