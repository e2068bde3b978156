"""From losses to answers: every normaliser in one pass, against the arithmetic written out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.evaluation.results.answers import NORMALISER, NORMALISERS, answers
from microlm.evaluation.tasks.prompts import PROTOCOLS, Question
from microlm.evaluation.tasks.task import TASKS


def question(task: str, label: float, endings: tuple[str, ...], row: int = 0, cluster: str = "") -> Question:
    return Question(
        *(task, str(row), cluster or str(row), label, "context", endings),
        characters=tuple(len(ending.removeprefix(" ")) for ending in endings),
        unconditional="Answer:",
        stratum=(),
    )


def answered(label: int, endings: tuple[str, ...], nats: list[float], tokens: list[int], **more: object) -> pd.Series:
    rows = more.pop("unconditional", None)
    apart = None if rows is None else [np.array(rows)]
    table = answers([question("hellaswag", label, endings)], [np.array(nats)], [np.array(tokens)], apart, **more)
    return table.iloc[0]


def test_each_normaliser_divides_by_its_own_length() -> None:
    # ' é' has 2 tokens, 1 character without the space, 3 bytes with it
    row = answered(1, (" é", " abcd", " ab"), [3.0, 8.0, 3.5], [2, 8, 1])
    assert [row[f"characters_{k}"] for k in range(3)] == [1, 4, 2]
    assert [row[f"bytes_{k}"] for k in range(3)] == [3, 5, 3]
    assert row["prediction_sum"] == 0
    assert row["prediction_token"] == 1  # 1.5, 1.0, 3.5
    assert row["prediction_character"] == 2  # 3, 2, 1.75
    assert row["prediction_byte"] == 0  # 1.0, 1.6, 1.17
    assert [row[f"correct_{n}"] for n in ("sum", "token", "character", "byte")] == [False, True, False, False]


def test_pmi_takes_what_the_ending_costs_without_the_question_away() -> None:
    row = answered(1, (" a", " b"), [2.0, 5.0], [1, 1], unconditional=[1.0, 4.5])
    assert row["prediction_sum"] == 0 and row["prediction_pmi"] == 1 and row["correct_pmi"]
    assert row["unconditional_1"] == 4.5
    assert "prediction_pmi" not in answered(1, (" a", " b"), [2.0, 5.0], [1, 1])


def test_among_equals_the_first_is_the_answer() -> None:
    row = answered(1, (" ab", " cd", " ef"), [4.0, 4.0, 4.0], [2, 2, 2], unconditional=[1.0, 1.0, 1.0])
    assert all(row[f"prediction_{name}"] == 0 for name in NORMALISERS)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_margin_is_positive_just_where_the_answer_by_bytes_is_right(seed: int) -> None:
    random = np.random.default_rng(seed)
    table = _random_table(random, 20)
    assert ((table["margin"] > 0) == table["correct_byte"]).all()
    by_byte = np.stack([table[f"nats_{k}"] / table[f"bytes_{k}"] for k in range(4)], axis=1)
    for row, label in enumerate(table["label"]):
        wrong = np.delete(by_byte[row], label)
        assert table.loc[row, "margin"] == pytest.approx(wrong.min() - by_byte[row, label])
        assert table.loc[row, "gold_nats"] == table.loc[row, f"nats_{label}"]
        assert table.loc[row, "gold_bytes"] == table.loc[row, f"bytes_{label}"]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_permuting_the_endings_permutes_the_answers(seed: int, order: list[int]) -> None:
    random = np.random.default_rng(seed)
    questions, nats, tokens = _random_questions(random, 12)
    table = answers(questions, nats, tokens, nats[::-1])
    permuted = [
        question("hellaswag", order.index(int(q.label)), tuple(q.endings[k] for k in order), int(q.id))
        for q in questions
    ]
    moved = [[rows[order] for rows in lists] for lists in (nats, tokens, nats[::-1])]
    again = answers(permuted, *moved)
    for name in NORMALISERS:
        assert np.array(order)[again[f"prediction_{name}"]].tolist() == table[f"prediction_{name}"].tolist()
        assert again[f"correct_{name}"].equals(table[f"correct_{name}"])
    pd.testing.assert_series_equal(again["margin"], table["margin"])


@pytest.mark.parametrize(
    ("nats", "tokens", "protocol", "near"),
    [
        ([4.0, 4.00005], [1, 2], "completion", True),  # by the sum, which acc is made of
        ([4.0, 8.0001], [1, 2], "completion", True),  # per token
        ([4.0, 8.0001], [1, 2], "infill", False),  # the sum alone counts there
        ([4.0, 8.001], [1, 2], "completion", False),
        ([8.0, 16.0001], [1, 1], "lm-eval", True),  # 2 and 4 characters
    ],
)
def test_a_near_tie_is_one_that_acc_or_acc_norm_hangs_on(
    nats: list[float], tokens: list[int], protocol: str, near: bool
) -> None:
    assert answered(0, (" ab", " abcd"), nats, tokens, protocol=protocol)["near_tie"] == near


def test_questions_of_fewer_endings_are_never_answered_beyond_them() -> None:
    questions = [question("hellaswag", 1, (" a", " b")), question("hellaswag", 2, (" a", " b", " c"), 1)]
    table = answers(questions, [np.array([2.0, 1.0]), np.array([2.0, 3.0, 1.0])], [np.ones(2), np.ones(3)], None)
    assert math.isnan(table.loc[0, "nats_2"]) and math.isnan(table.loc[0, "bytes_2"])
    assert table["prediction_byte"].tolist() == [1, 2]
    assert table["margin"].tolist() == pytest.approx([0.5, 0.5])


def test_a_regression_answers_by_its_expected_value() -> None:
    endings = tuple(f" {k}" for k in range(6))
    p = np.array([0.1, 0.1, 0.2, 0.3, 0.2, 0.1])
    # a constant added to every loss, even one that exp cannot hold, changes nothing
    table = answers([question("stsb", 3.8, endings)] * 2, [-np.log(p), 900 - np.log(p)], [np.ones(6)] * 2, None)
    assert table["value"].tolist() == pytest.approx([(p * np.arange(6)).sum()] * 2)
    assert table["label"].tolist() == [3.8, 3.8]
    assert not any(column.startswith(("prediction", "correct", "gold")) for column in table)


def test_scores_of_other_than_the_endings_are_refused() -> None:
    with pytest.raises(ValueError, match="each of its endings"):
        answered(0, (" a", " b"), [1.0, 2.0, 3.0], [1, 1])


def test_every_protocol_of_a_choice_task_says_what_acc_norm_is() -> None:
    asked = {protocol for task in TASKS.values() if task.kind == "choice" for protocol in task.protocols}
    assert asked <= set(NORMALISER) <= set(PROTOCOLS) and set(NORMALISER.values()) <= set(NORMALISERS)


def _random_questions(random: np.random.Generator, n: int) -> tuple[list[Question], list, list]:
    texts = [tuple(" " + "x" * int(random.integers(1, 30)) for _ in range(4)) for _ in range(n)]
    questions = [question("hellaswag", int(random.integers(4)), endings, i) for i, endings in enumerate(texts)]
    return questions, list(random.gamma(3, 8, (n, 4))), list(random.integers(1, 9, (n, 4)))


def _random_table(random: np.random.Generator, n: int) -> pd.DataFrame:
    return answers(*_random_questions(random, n), None)
