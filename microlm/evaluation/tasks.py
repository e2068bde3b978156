"""What is asked: HellaSwag, SNLI, the nine GLUE tasks and CB, and fixed subsets of their questions."""

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from microlm.errors import UserError

ENDINGS = 4  # of a HellaSwag question
CHANCE = 1 / ENDINGS
UNLABELLED = -1  # what the hub writes where no gold label was agreed on or published


@dataclass(frozen=True)
class Task:
    """A data set's evaluated split and how it is scored.

    Attributes:
        kind: choice among endings, or regression on a gold value.
        split: name of the evaluated split as published.
        choices: names of the labels in the order of their ids; () where each question brings its own endings.
        metrics: of acc, acc_norm, f1 (of the positive class; for cb the mean of the one-against-rest F1s), mcc,
            pearson, spearman.
        primary: the one of `metrics` that stands for the task.
        protocols: the wordings it can be asked in, the default first.
        note: what a reader of its figures has to know; may be empty.
        columns: of text, as the hub names them.
        cluster: column whose equal texts make questions correlated; "" where each question stands alone.
        published: questions with a label in the published split.
    """

    name: str
    kind: Literal["choice", "regression"]
    split: str
    choices: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    protocols: tuple[str, ...]
    note: str = ""
    columns: tuple[str, ...] = field(default=(), kw_only=True)
    cluster: str = field(default="", kw_only=True)
    published: int = field(default=0, kw_only=True)

    @property
    def chance(self) -> float | None:
        """Accuracy of a blind guess; None for a regression."""
        return None if self.kind == "regression" else 1 / (len(self.choices) or ENDINGS)


_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_PREMISE = {"columns": ("premise", "hypothesis"), "cluster": "premise"}


def _glue(
    name: str,
    choices: tuple[str, ...],
    columns: tuple[str, ...],
    published: int,
    metrics: tuple[str, ...] = ("acc",),
    cluster: str = "",
) -> Task:
    return Task(
        *(name, "choice", "validation", choices, metrics, metrics[0], ("lm-eval",)),
        columns=columns,
        cluster=cluster,
        published=published,
    )


def _mnli(name: str, split: str, published: int) -> Task:
    return Task(name, "choice", split, _NLI, ("acc",), "acc", ("lm-eval", "infill"), published=published, **_PREMISE)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            *("hellaswag", "choice", "validation", (), ("acc_norm", "acc"), "acc_norm"),
            ("completion", "lm-eval", "olmes"),
            columns=("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split_type"),
            cluster="source_id",
            published=10_042,
        ),
        Task("snli", "choice", "test", _NLI, ("acc",), "acc", ("question", "infill"), published=9_824, **_PREMISE),
        _glue("cola", ("unacceptable", "acceptable"), ("sentence",), 1_043, ("mcc", "acc")),
        _glue("sst2", ("negative", "positive"), ("sentence",), 872),
        _glue("mrpc", ("not_equivalent", "equivalent"), _PAIR, 408, ("acc", "f1")),
        Task(
            *("stsb", "regression", "validation", (), ("pearson", "spearman"), "pearson", ("microlm",)),
            note="gold scores from 0 to 5 against the expected value over the endings 0 to 5",
            columns=_PAIR,
            published=1_500,
        ),
        _glue("qqp", ("not_duplicate", "duplicate"), ("question1", "question2"), 40_430, ("acc", "f1")),
        _mnli("mnli", "validation_matched", 9_815),
        _mnli("mnli_mismatched", "validation_mismatched", 9_832),
        _glue("qnli", ("entailment", "not_entailment"), ("question", "sentence"), 5_463, cluster="question"),
        _glue("rte", ("entailment", "not_entailment"), _PAIR, 277, cluster="sentence1"),
        _glue("wnli", ("not_entailment", "entailment"), _PAIR, 71, cluster="sentence1"),
        Task(
            *("cb", "choice", "validation", ("entailment", "contradiction", "neutral"), ("acc", "f1"), "acc"),
            ("lm-eval", "infill"),
            "3-way stand-in for SNLI: 56 items",
            published=56,
            **_PREMISE,
        ),
    )
}


def task_named(name: str) -> Task:
    """UserError if there is no such task: it lists all, and names the one that was probably meant."""
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"tasks: {name!r} is not a task{meant}; choose of {', '.join(TASKS)}")


class Stratified(Protocol):
    """`id` is the number of the row in the published split, unique and stable."""

    @property
    def task(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def stratum(self) -> tuple[str, ...]: ...


AnyQuestion = TypeVar("AnyQuestion", bound=Stratified)


def stratified_subset(questions: Sequence[AnyQuestion], n: int) -> list[AnyQuestion]:
    """The `n` questions that stand for all, in the order of their rows: the same for every model, machine and seed.

    Each stratum gives its share, rounded by largest remainder; within a stratum the questions come in the order of a
    hash of task and id. UserError if there are fewer than `n`.
    """
    if n > len(questions):
        raise UserError(
            f"{n} questions are asked for, and there are {len(questions)}; lower hellaswag_items or the benchmark's "
            "items in params.yaml, or --limit"
        )
    strata: dict[tuple[str, ...], list[AnyQuestion]] = defaultdict(list)
    for question in sorted(questions, key=_order):
        strata[question.stratum].append(question)
    keys = sorted(strata)
    shares = {key: divmod(n * len(strata[key]), len(questions)) for key in keys}
    left = n - sum(whole for whole, _ in shares.values())
    rounded_up = set(sorted(keys, key=lambda key: (-shares[key][1], key))[:left])
    chosen = [question for key in keys for question in strata[key][: shares[key][0] + (key in rounded_up)]]
    return sorted(chosen, key=lambda question: int(question.id))


def _order(question: Stratified) -> bytes:
    return hashlib.sha256(f"{question.task}:{question.id}".encode()).digest()
