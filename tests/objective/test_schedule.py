"""What is minimized when: alpha's schedules, and the notebook's loss by its name alone."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.config import load_config
from microlm.objective.schedule import AlphaSchedule
from microlm.parameters import NOTEBOOK_TEMPERATURE
from microlm.pipeline.asked_objective import objective_schedule

KINDS = ("constant", "linear", "cosine", "warmup_stable_decay")
unit = st.floats(0, 1)


@given(st.sampled_from(KINDS), unit, unit, unit, st.floats(0, 0.5), st.floats(0, 0.5))
def test_alpha_stays_between_its_ends(kind, start, end, progress, warmup, decay):
    alpha = AlphaSchedule(kind, start, end, warmup, decay)(progress)
    assert min(start, end) - 1e-12 <= alpha <= max(start, end) + 1e-12


def test_schedules_begin_and_end_where_they_say():
    for kind in ("linear", "cosine"):
        schedule = AlphaSchedule(kind, 0.9, 0.1, 0.1, 0.5)
        assert schedule(0) == pytest.approx(0.9) and schedule(1) == pytest.approx(0.1)
        assert schedule(0.5) == pytest.approx(0.5)
    constant = AlphaSchedule("constant", 0.9, 0.1, 0.1, 0.5)
    assert {constant(p / 10) for p in range(11)} == {0.9}
    held = AlphaSchedule("warmup_stable_decay", 0.9, 0.1, 0.2, 0.5)
    assert held(0) == pytest.approx(0.1) and held(0.3) == 0.9 and held(1) == pytest.approx(0.1)


def test_the_notebooks_loss_is_what_was_published_whatever_else_is_set():
    config = replace(load_config(), objective="notebook", alpha=0.3, temperature=1.0)
    schedule = objective_schedule(config)
    first, last = schedule(0), schedule(1)
    assert (first.ce_weight, first.kd_weight, first.temperature) == (0, 1, NOTEBOOK_TEMPERATURE)  # no T^2, no CE
    assert (first.divergence.parameter, last.divergence.parameter) == pytest.approx((0.9, 0.1))
    assert first.divergence.name == "notebook"


@pytest.mark.parametrize("objective", ["rkl", "fkl", "jsd", "skew_rkl", "skew_fkl", "tvd"])
def test_weights_are_those_of_the_documented_loss(objective):
    config = replace(load_config(), objective=objective, alpha=0.3, temperature=2.5, beta=0.2, skew=0.4)
    made = objective_schedule(config)(0.7)
    assert (made.ce_weight, made.kd_weight) == pytest.approx((0.7, 0.3 * 2.5**2))
    parameter = {"jsd": 0.2, "skew_rkl": 0.4, "skew_fkl": 0.4}.get(objective)
    assert made.divergence.parameter == parameter if parameter else math.isnan(made.divergence.parameter)


def test_minillm_takes_the_text_s_share_alone_from_the_windows():
    config = replace(load_config(), objective="minillm", alpha=0.3)
    made = objective_schedule(config)(0.0)
    assert (made.ce_weight, made.kd_weight) == pytest.approx((0.7, 0.0))
