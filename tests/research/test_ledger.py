"""The ledger: where two ways of paying for a teacher meet, and a page of it for a pipeline that ran."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.errors import UserError
from microlm.files import read_json, write_json
from microlm.research.ledger import break_even, ledger, summary
from stages.ledger import METRICS, main
from tests.support.workspace import RUNTIME, config_of, inside, make_workspace

amounts = st.floats(1e-3, 1e5)


@settings(max_examples=300)
@given(capture_s=amounts, cached_s=amounts, saved_s=amounts, steps=st.floats(0.5, 1e5), epochs=st.integers(1, 100))
def test_at_the_break_even_both_ways_have_cost_the_same(capture_s, cached_s, saved_s, steps, epochs):
    live_s = cached_s + saved_s
    met = break_even(capture_s, cached_s, live_s, steps, epochs)
    saved_s = live_s - cached_s  # as far as floating point kept it

    def behind(after: float) -> float:
        """Seconds that the way through the cache is still dearer by, after so many epochs."""
        return capture_s - after * steps * saved_s

    slack = 1e-9 * capture_s
    assert met.reason is None
    assert abs(behind(met.epochs)) <= slack
    assert behind(met.epochs * 0.99) > 0 > behind(met.epochs * 1.01)
    assert met.students >= 1 and behind(met.students * epochs) <= slack
    assert met.students == 1 or behind((met.students - 1) * epochs) > -slack


@given(capture_s=amounts, cached_s=amounts, dearer_s=st.floats(0, 1e5), steps=amounts, epochs=st.integers(1, 100))
def test_where_live_is_not_dearer_there_is_no_break_even(capture_s, cached_s, dearer_s, steps, epochs):
    met = break_even(capture_s, cached_s + dearer_s, cached_s, steps, epochs)
    assert (met.epochs, met.students) == (None, None) and "not dearer" in met.reason


@given(*[st.floats().map(abs)] * 3, st.floats(1e-3, 1e9), st.integers(1, 100))
def test_whatever_was_measured_the_answer_is_a_number_or_a_reason(capture_s, cached_s, live_s, steps, epochs):
    met = break_even(capture_s, cached_s, live_s, steps, epochs)
    assert (met.epochs is None) == (met.students is None) == (met.reason is not None)
    assert met.epochs is None or (math.isfinite(met.epochs) and met.students >= 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("ledger") / "workspace")


def test_the_stage_writes_what_capture_and_steps_cost(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stages.ledger"])
    with inside(finished):
        main()
        entries = read_json(METRICS / "ledger.json", "ledger")
        teacher = read_json("metrics/teacher.json", "teacher")
        size = sum(path.stat().st_size for path in Path("data/teacher").iterdir())
    assert entries["cache"]["bytes"] == size
    assert entries["cache"]["bytes_per_token"] >= teacher["bytes_per_token"]
    assert entries["teacher"]["capture_s"] == pytest.approx(teacher["tokens"] / teacher["tokens_per_s"], abs=0.06)
    config, step = config_of(finished), entries["step"]
    assert step["tokens"] == config.at.batch.batch_tokens
    assert min(step["cross_entropy_s"], step["cached_s"], step["live_s"]) > 0
    assert step["live_over_cached"] == pytest.approx(step["live_s"] / step["cached_s"], rel=0.05)
    expected = break_even(
        entries["teacher"]["capture_s"],
        step["cached_s"],
        step["live_s"],
        config.at.teacher.windows / config.at.batch.rows,
        config.at.continuation.epochs,
    )
    assert (entries["break_even"]["reason"] is None) == (expected.reason is None)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == summary(entries) and printed.startswith("\nledger: ")


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"objective": "minillm"}, "no cache has labelled"), ({"alpha": 0.0, "objective": "rkl"}, "alpha is 0")],
)
def test_where_no_cache_is_asked_there_are_nulls_and_a_reason(finished, changes, told):
    with inside(finished):
        entries = ledger(replace(config_of(finished), **changes), RUNTIME)
    assert entries["step"]["cross_entropy_s"] > 0
    assert {entries["step"][name] for name in ("cached_s", "live_s", "live_over_cached")} == {None}
    assert entries["break_even"]["epochs"] is None and told in entries["break_even"]["reason"]
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    assert told in summary(entries)


def test_a_capture_of_unknown_speed_has_no_break_even(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    with inside(tmp_path / "copy"):
        teacher = read_json("metrics/teacher.json", "teacher")
        write_json("metrics/teacher.json", {**teacher, "tokens_per_s": 0.0})
        entries = ledger(config_of(finished), RUNTIME)
        assert entries["teacher"]["capture_s"] is None and "speed is not known" in entries["break_even"]["reason"]
        write_json("metrics/teacher.json", {})
        with pytest.raises(UserError, match=r"metrics/teacher.json lacks 'tokens'; make it again with: dvc repro"):
            ledger(config_of(finished), RUNTIME)
