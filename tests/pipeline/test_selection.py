"""Which windows the continuations train on, from what they start, and what minillm needs: refusals before any work."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from microlm.config import Config
from microlm.corpus.batches import cached_windows, window_count
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.files import read_json
from microlm.models.model_files import load_student
from microlm.pipeline.select import chosen_windows, largest_differences, select_windows
from microlm.pipeline.training_stages import continuation, distill
from microlm.runtime.paths import WINDOWS
from microlm.teacher.cache import TeacherCache, cache_identity
from tests.support.workspace import RUNTIME, config_of, inside, make_workspace, write_own_teacher


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "workspace")


def with_windows(config: Config, windows: str, fraction: float = 0.25) -> Config:
    continuation = replace(config.at.continuation, windows=windows, select_fraction=fraction)
    return replace(config, at=replace(config.at, continuation=continuation))


def selected(config: Config) -> np.ndarray:
    select_windows(config, RUNTIME)
    return chosen_windows(config, TokenShards(Path("data/shards"), "train"))


nats = arrays.arrays(np.float64, 12, elements=st.floats(0, 20))


@given(nats, nats, st.integers(1, 12))
def test_difference_sampling_keeps_where_the_reference_is_furthest_behind(teacher, reference, keep):
    kept = largest_differences(teacher, reference, keep)
    assert len(kept) == keep and (np.diff(kept) > 0).all()
    behind = reference - teacher
    left = np.setdiff1d(np.arange(12), kept)
    assert not len(left) or behind[kept].min() >= behind[left].max()


def test_each_choice_of_windows_is_what_it_says(workspace: Path) -> None:
    with inside(workspace):
        config, shards = config_of(workspace), TokenShards(Path("data/shards"), "train")
        seq_len = config.at.batch.seq_len
        pool = cached_windows(shards, seq_len, config.at.teacher.windows)
        assert (selected(with_windows(config, "cached")) == pool).all()
        assert (selected(with_windows(config, "any")) == np.arange(window_count(shards, seq_len))).all()
        random = selected(with_windows(config, "random"))
        assert len(random) == round(len(pool) / 4) and set(random) < set(pool)
        assert set(selected(replace(with_windows(config, "random"), seed=config.seed + 1))) != set(random)


def test_difference_sampling_agrees_with_the_cache_and_the_control(workspace: Path) -> None:
    with inside(workspace):
        config, shards = config_of(workspace), TokenShards(Path("data/shards"), "train")
        seq_len = config.at.batch.seq_len
        pool = cached_windows(shards, seq_len, config.at.teacher.windows)
        chosen = selected(with_windows(config, "difference"))
        identity = cache_identity(config.at.teacher, config.at.batch.seq_len, shards)
        cache = TeacherCache(Path("data/teacher"), identity, pool)
        teacher = -cache.gold(pool).sum(-1)
        lengths = np.ones(load_student(Path("models/control")).n_vocab, dtype=np.int64)
        reference = loss_on(load_student(Path("models/control")), shards, lengths, seq_len, pool, 4).window_nats
        ahead = reference - teacher
        kept = np.isin(pool, chosen)
        assert kept.sum() == len(chosen) == round(len(pool) / 4)
        assert ahead[kept].min() >= ahead[~kept].max() - 1e-3
        told = read_json("metrics/windows.json", "select")
        gain = {k: told[k]["reference_nats"] - told[k]["teacher_nats"] for k in ("chosen", "all")}
        assert gain["chosen"] > gain["all"]


def test_every_choice_trains_for_as_many_steps(workspace: Path) -> None:
    with inside(workspace):
        config = config_of(workspace)
        steps = set()
        for windows in ("cached", "difference", "random", "any"):
            chosen = with_windows(config, windows)
            select_windows(chosen, RUNTIME)
            steps |= {
                continuation(replace(chosen, init=init), "continued").plan.steps for init in ("control", "scratch")
            }
        assert len(steps) == 1


def test_from_scratch_the_control_is_not_looked_at(workspace: Path) -> None:
    with inside(workspace):
        config = config_of(workspace)
        select_windows(config, RUNTIME)
        from_control, fresh = (continuation(replace(config, init=init), "student") for init in ("control", "scratch"))
        assert from_control.plan.first_step == config.at.pretrain.tokens // config.at.batch.batch_tokens
        assert (fresh.plan.first_step, fresh.plan.optimization) == (0, config.at.pretrain)
        shutil.rmtree("models/control")
        continuation(replace(config, init="scratch"), "student")
        with pytest.raises(UserError, match="models/control"):
            continuation(replace(config, init="control"), "student")


@pytest.mark.parametrize("content", [None, b"", b"not numpy"])
def test_windows_that_are_absent_or_damaged_are_named(workspace: Path, content: bytes | None) -> None:
    with inside(workspace):
        config, shards = config_of(workspace), TokenShards(Path("data/shards"), "train")
        if content is not None:
            WINDOWS.parent.mkdir(exist_ok=True)
            WINDOWS.write_bytes(content)
        with pytest.raises(UserError, match=r"^data/windows\.npy is (not there|damaged).* dvc repro .*select"):
            chosen_windows(config, shards)


def test_minillm_without_the_teachers_weights_is_refused_before_training(workspace: Path) -> None:
    with inside(workspace):
        config = replace(config_of(workspace), objective="minillm")
        select_windows(config, RUNTIME)
        shutil.rmtree(config.at.teacher.model)
        with pytest.raises(UserError, match=r"teacher\.model: .*minillm samples from the teacher.*cache cannot serve"):
            distill(config, RUNTIME)
        assert not Path("models/student").exists()


def test_a_live_teacher_with_another_tokenizer_is_refused_before_training(workspace: Path) -> None:
    with inside(workspace):
        config = replace(config_of(workspace), objective="minillm")
        select_windows(config, RUNTIME)
        shutil.rmtree(config.at.teacher.model)
        write_own_teacher(Path(config.at.teacher.model))
        settings = Path(config.at.teacher.model) / "tokenizer.json"
        settings.write_text(settings.read_text().replace('"<|endoftext|>"', '"<|elsewhere|>"'))
        with pytest.raises(UserError, match=r"teacher\.model: .*(tokenizer|tokens)"):
            distill(config, RUNTIME)
