"""Promises of questions whose endings have contexts of their own, of last words, and of what is left out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from microlm.config import load_config
from microlm.evaluation.candidates import Candidate, load_candidate
from microlm.evaluation.run import score_benchmark
from microlm.evaluation.scoring.backends import missed
from microlm.evaluation.scoring.encoding import encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.benchmarks import Material, benchmarks, gather
from microlm.evaluation.tasks.prompts import questions
from microlm.evaluation.tasks.task import TASKS, Benchmark
from stages.evaluate import _benchmarks
from tests.evaluation.test_task_files import read_published
from tests.support.tiny_candidates import repository

STUDENT = Path("models/student")
WAYS = ("tree", "cached", "plain")


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    return load_candidate(str(STUDENT), None, torch.float32)


def material(name: str) -> Material:
    task = TASKS[name]
    return Material(Benchmark(name, "lm-eval", 0, None), tuple(questions(task, "lm-eval", read_published(task))))


def ids(candidate: Candidate, *texts: str) -> list[list[int]]:
    return [list(map(int, found)) for found in candidate.tokenizer.encode_batch(texts)]


def nats_of(candidate: Candidate, context: str, ending: str) -> float:
    """From the network's own logits, one text at a time."""
    before, whole = ids(candidate, context, context + ending)
    model = candidate.model
    with torch.inference_mode():
        log_p = model.logits(model.hidden(torch.tensor(whole)[None])[0]).log_softmax(-1)
    return -sum(float(log_p[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def test_winogrande_scores_one_continuation_after_each_option(candidate: Candidate) -> None:
    asked = material("winogrande")
    table = score_benchmark(candidate, asked, 512).table
    for k in range(2):
        expected = [nats_of(candidate, q.context + q.openings[k], q.endings[k]) for q in asked.questions]
        np.testing.assert_allclose(table[f"nats_{k}"], expected, atol=1e-4)
    encoding = encode(asked.reads, candidate.tokenizer, candidate.model.context, candidate.start_token)
    by_way = [np.concatenate(score(candidate.model, encoding.questions, 512, backend=way)) for way in WAYS]
    np.testing.assert_allclose(by_way[0], by_way[2], atol=1e-4)
    np.testing.assert_allclose(by_way[1], by_way[2], atol=1e-4)


def test_questions_of_different_numbers_of_endings_stand_in_one_table(candidate: Candidate) -> None:
    found = score_benchmark(candidate, material("arc_easy"), 512)
    assert found.metrics["chance"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 3) / 3, abs=1e-6)
    assert found.table["nats_3"].isna().tolist() == [False, False, True]
    assert found.table["prediction_sum"].max() <= 3 and found.table["near_tie"].dtype == bool


def test_a_word_is_right_only_if_greedy_decoding_writes_it(candidate: Candidate) -> None:
    asked = material("lambada_openai")
    model = candidate.model
    with torch.inference_mode():
        written = []
        for question in asked.questions:
            before, whole = ids(candidate, question.context, question.context + question.endings[0])
            best = model.logits(model.hidden(torch.tensor(whole)[None])[0]).argmax(-1)
            written.append([int(best[i - 1] != whole[i]) for i in range(len(before), len(whole))])
    encoding = encode(asked.reads, candidate.tokenizer, model.context, candidate.start_token)
    for way in WAYS:
        found = score(model, encoding.questions, 512, backend=way, measure=missed)
        assert [int(one[0]) for one in found] == list(map(sum, written))
    # a greedy continuation of the model's own is right
    (context,) = ids(candidate, asked.questions[0].context)
    with torch.inference_mode():
        best = int(model.logits(model.hidden(torch.tensor(context)[None])[0, -1:]).argmax(-1))
    own = [replace(encoding.questions[0], endings=(np.array([best]),))]
    assert score(model, own, 512, measure=missed)[0].tolist() == [0.0]
    table = score_benchmark(candidate, asked, 512).table
    assert table["correct_sum"].tolist() == [not sum(each) for each in written]


def test_boolq_is_left_out_where_its_passages_are_in_the_corpus(candidate: Candidate, tmp_path: Path) -> None:
    config = load_config()
    asked = replace(config.at.evaluation.benchmarks[0], tasks=["boolq", "copa"], protocol=None, shots=0, items=2)
    at = replace(config.at, evaluation=replace(config.at.evaluation, benchmarks=[asked], data=None, hub=False))
    assert at.corpus.source == "packaged"
    found = _benchmarks(candidate, replace(config, at=at), tmp_path)
    status = {"status": "left out", "reason": "left out: its texts are in the corpus"}
    assert found["boolq"]["lm-eval"]["0-shot"] == status and found["copa"]["lm-eval"]["0-shot"]["items"] == 2
    for corpus in ("files", ""):
        (scored,) = gather(benchmarks(["boolq"], None, [0], 2), None, False, corpus)
        assert len(scored.questions) == 2
