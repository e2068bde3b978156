"""Tables of answers from random losses: results without a model."""

import dataclasses

import numpy as np
import pandas as pd

from microlm.evaluation.results.answers import answers
from microlm.evaluation.results.metrics import task_metrics
from microlm.evaluation.results.store import Identity, Result
from microlm.evaluation.tasks.prompts import Question
from microlm.evaluation.tasks.task import TASKS


def toy_table(
    task: str, n: int, seed: int, skill: float = 0.0, questions: int = 0, per_cluster: int = 1
) -> pd.DataFrame:
    """Answers to `n` questions, the same ones for each `seed`; `skill` is taken off the true ending's nats."""
    asked = np.random.default_rng([questions, 1])
    choices = 6 if task == "stsb" else len(TASKS[task].choices) or (*TASKS[task].counts, 1)[0]
    endings = [tuple(f" {k}" if task == "stsb" else " " + "w" * int(asked.integers(1, 20)) for k in range(choices))] * n
    labels = asked.random(n) * 5 if task == "stsb" else asked.integers(0, choices, n)
    lengths = [tuple(len(ending) - 1 for ending in texts) for texts in endings]
    made = [
        Question(task, str(i), f"s{i // per_cluster}", labels[i], "c", endings[i], lengths[i], "Answer:", ())
        for i in range(n)
    ]
    nats = np.random.default_rng([seed, 2]).gamma(4, 3, (n, choices))
    near = np.abs(np.arange(choices) - labels[:, None]) < 0.5
    nats = np.where(near, nats - skill, nats)
    missed = list(np.random.default_rng([seed, 3]).integers(0, 2, (n, 1)))
    return answers(made, list(nats), [np.array(sizes) for sizes in lengths], None, TASKS[task].protocols[0], missed)


def toy_result(task: str, model: str = "student", n: int = 60, seed: int = 0, skill: float = 0.0, **changed) -> Result:
    """A whole result under the task's default protocol with `changed` fields of its identity; `limit` changes n too."""
    protocol = TASKS[task].protocols[0]
    identity = {"model": model, "model_digest": f"digest of {model}", "tokenizer": "digest of words", "task": task}
    identity |= {"protocol": protocol, "shots": 0, "limit": None, "data_sha256": "d" * 64, "questions_sha256": "q" * 64}
    identity |= changed
    table = toy_table(task, identity["limit"] or n, seed, skill)
    metrics = task_metrics(TASKS[task], protocol, identity["shots"], table)
    return Result(Identity(**identity), metrics, table)


def absent(task: str, model: str = "student") -> Result:
    identity = toy_result(task, model, n=2).identity
    nothing = dataclasses.replace(identity, data_sha256=None, questions_sha256=None)
    return Result(nothing, unavailable="not packaged, no file under data/tasks, the hub does not answer")
