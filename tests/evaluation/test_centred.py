"""Promises of the centred mean: what it is, how its tasks are chosen and resampled, and where it is shown."""

import json
from pathlib import Path

import numpy as np
import pytest

from microlm.evaluation.results.metrics import centred_means, compare, once
from microlm.evaluation.results.store import Result, write_result
from microlm.report.evaluation_table import comparison_text
from microlm.report.summary import benchmark_rows, blind, centred_mean_rows
from microlm.report.text_table import WIDTH
from tests.support.toy_results import absent, toy_result

TASKS = ("hellaswag", "rte", "snli", "commonsense_qa", "lambada_openai")
CHANCES = (1 / 4, 1 / 2, 1 / 3, 1 / 5, 0)
DRAWS = 400


def models(*skills: float, n: int = 60) -> list[list[Result]]:
    return [[toy_result(task, f"m{k}", n=n, seed=k, skill=skill) for task in TASKS] for k, skill in enumerate(skills)]


def right(result: Result) -> np.ndarray:
    """Computed from the losses: no column of answers is read."""
    nats, label = result.table.filter(regex=r"^nats_").to_numpy(), result.table["label"].to_numpy()
    if result.identity.task in ("hellaswag", "commonsense_qa"):
        name = "tokens" if result.identity.protocol == "completion" else "characters"
        nats = nats / result.table.filter(regex=f"^{name}_").to_numpy()
    return nats.argmin(axis=1) == label if nats.shape[1] > 1 else result.table["correct_sum"].to_numpy()


def test_it_is_the_mean_of_centred_accuracies_over_tasks() -> None:
    both = models(0.0, 4.0)
    tasks, values, _ = centred_means(both, DRAWS, 1)
    for results, value in zip(both, values, strict=True):
        by_hand = [(right(r).mean() - chance) / (1 - chance) for r, chance in zip(results, CHANCES)]
        assert value == pytest.approx(sum(by_hand) / len(TASKS), abs=1e-12)
    assert tasks[1] == "rte (lm-eval, 0-shot)" and len(tasks) == len(TASKS)


def test_its_interval_is_that_of_independent_paired_resamples_within_each_task() -> None:
    both = models(0.0, 2.0, n=200)
    _, _, resampled = centred_means(both, 4_000, 1)
    differences = [
        (right(b).astype(float) - right(a)) / (1 - chance) for a, b, chance in zip(*both, CHANCES, strict=True)
    ]
    error = np.sqrt(sum(d.var() / len(d) for d in differences)) / len(TASKS)
    spread = (resampled[1] - resampled[0]).std()
    assert spread == pytest.approx(error, rel=0.05)
    _, _, same = centred_means([both[0], both[0]], DRAWS, 1)
    assert np.array_equal(same[0], same[1])


def test_each_task_counts_once_and_only_by_an_accuracy() -> None:
    results = [toy_result("rte", shots=5), toy_result("rte"), toy_result("cola"), toy_result("stsb"), absent("snli")]
    assert [(r.identity.task, r.identity.shots) for r in once([*results, toy_result("sst2")])] == [
        ("rte", 5),
        ("sst2", 0),
    ]
    with pytest.raises(ValueError, match="the same tasks"):
        centred_means([[results[1]], [toy_result("sst2")]], DRAWS, 1)


def test_the_summary_has_it_for_models_and_differences(tmp_path: Path) -> None:
    for name, skill in (("student", 3.0), ("continued", 0.0)):
        for result in (toy_result("rte", name, skill=skill), toy_result("rte", name, skill=9.0, shots=5)):
            write_result(tmp_path, result)
        write_result(tmp_path, toy_result("arc_easy", name, seed=len(name)))
        write_result(tmp_path, absent("boolq", name))
    order = [("rte", None, 0), ("arc_easy", "lm-eval", 0), ("rte", "lm-eval", 5)]
    pair = [("student", "continued")]
    tasks, rows = centred_mean_rows(("student", "continued"), pair, order, DRAWS, 1, tmp_path)
    assert tasks == ["rte (lm-eval, 0-shot)", "arc_easy (lm-eval, 0-shot)"]
    both = rows["student_minus_continued"]
    assert both["centred_mean"] == pytest.approx(
        rows["student"]["centred_mean"] - rows["continued"]["centred_mean"], abs=2e-6
    )
    for row in rows.values():
        assert row["centred_mean_low"] < row["centred_mean"] < row["centred_mean_high"]
        assert row["centred_mean_detectable"] > 0
    found = {row["task"]: row for row in benchmark_rows(("student", "continued"), DRAWS, 1, tmp_path)}
    assert found["arc_easy"]["blind"] == 0.25 and found["rte"]["blind"] >= 0.5
    assert blind("pearson", {}) is None


def test_a_comparison_has_it_over_what_both_were_asked(tmp_path: Path) -> None:
    for name, skill in (("a", 4.0), ("b", 0.0)):
        for task in ("rte", "arc_easy", "stsb"):
            write_result(tmp_path, toy_result(task, name, seed=ord(name), skill=skill))
        write_result(tmp_path, toy_result("rte", name, shots=5))
    write_result(tmp_path, toy_result("sst2", "a"))
    found = compare(tmp_path / "a", tmp_path / "b", draws=DRAWS)
    entry = found["centred_mean"]
    assert entry["tasks"] == ["rte (lm-eval, 0-shot)", "arc_easy (lm-eval, 0-shot)"]
    assert entry["a"] > entry["b"] and entry["low"] > 0 and entry["detectable"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert max(map(len, comparison_text(found).splitlines())) <= WIDTH
    assert "centred mean of 2 tasks" in comparison_text(found)
