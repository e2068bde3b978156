"""The strings that are scored: each task under each protocol.

| protocol | what it is |
|---|---|
| completion | HellaSwag as build-nanogpt asks it: the raw `ctx`, each ending after one space |
| lm-eval | HellaSwag and GLUE as lm-evaluation-harness 0.4.13 words them, double spaces included |
| olmes | HellaSwag as OLMES does (arXiv 2406.08446): a title that ends in a full stop keeps one; lm-eval makes it two |
| question | SNLI in lm-eval's words for MNLI |
| infill | entailment as lm-eval asks XNLI: "premise, right? Yes, hypothesis", from "right?" on; texts as they are |
| microlm | STS-B, which lm-eval has not: our own words |
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from microlm.errors import UserError
from microlm.evaluation.formats import Row
from microlm.evaluation.sources import Rows
from microlm.evaluation.tasks import Task

PROTOCOLS = ("completion", "lm-eval", "olmes", "question", "infill", "microlm")
DELIMITER = " "  # between a context and an ending
SCORES = tuple(map(str, range(6)))  # STS-B's endings


@dataclass(frozen=True)
class Question:
    """One question as it is scored.

    Attributes:
        id: number of the row in the published split.
        cluster: questions that share it have correlated errors.
        label: index of the true ending, or the gold value of a regression.
        context: without a few-shot prefix.
        endings: exactly the scored strings, leading space included.
        characters: what per-character normalisation divides by: the ending without the delimiter as lm-eval counts,
            with it under olmes, as AI2's evaluation code does.
        unconditional: the context that PMI sets against `context`.
        stratum: what a fixed subset keeps the proportions of.
    """

    task: str
    id: str
    cluster: str
    label: float
    context: str
    endings: tuple[str, ...]
    characters: tuple[int, ...]
    unconditional: str
    stratum: tuple[str, ...]


def _hellaswag_text(title: str) -> Callable[[str], str]:
    """The rendering that takes `title`, a pattern, for the end of a step's title and removes WikiHow's brackets."""

    def render(text: str) -> str:
        text = re.sub(title, ". ", text.strip())
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    return render


_HELLASWAG: dict[str, Callable[[str], str]] = {
    "lm-eval": _hellaswag_text(r" \[title\]"),
    "olmes": _hellaswag_text(r"\.? \[title\]"),
}


@dataclass(frozen=True)
class Wording:
    """Templates over a row's columns; "{statement}" is the hypothesis with a full stop. One answer for each label."""

    context: str
    answers: tuple[str, ...]
    unconditional: str = "Answer:"


def _ask(question: str, *answers: str) -> Wording:
    return Wording(f"{question}\nAnswer:", answers)


def _infill(*openings: str) -> Wording:
    return Wording("{premise}, right?", tuple(f"{opening}, {{hypothesis}}" for opening in openings), "right?")


_PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
_TRUE_NEITHER_FALSE = _ask("{premise}\nQuestion: {statement} True, False or Neither?", "True", "Neither", "False")
_WORDINGS: dict[tuple[str, str], Wording] = {
    ("snli", "question"): _TRUE_NEITHER_FALSE,
    ("snli", "infill"): _infill("Yes", "Also", "No"),
    ("cola", "lm-eval"): _ask("{sentence}\nQuestion: Does this sentence make sense?", "no", "yes"),
    ("sst2", "lm-eval"): _ask("{sentence}\nQuestion: Is this sentence positive or negative?", "negative", "positive"),
    ("mrpc", "lm-eval"): _ask(_PAIR + "Question: Do both sentences mean the same thing?", "no", "yes"),
    ("stsb", "microlm"): _ask(
        _PAIR + "Question: From 0 (unrelated) to 5 (the same), how close in meaning are the sentences?", *SCORES
    ),
    ("qqp", "lm-eval"): _ask(
        "Question 1: {question1}\nQuestion 2: {question2}\nQuestion: Do both questions ask the same thing?", "no", "yes"
    ),
    ("mnli", "lm-eval"): _TRUE_NEITHER_FALSE,
    ("mnli", "infill"): _infill("Yes", "Also", "No"),
    ("mnli_mismatched", "lm-eval"): _TRUE_NEITHER_FALSE,
    ("mnli_mismatched", "infill"): _infill("Yes", "Also", "No"),
    ("qnli", "lm-eval"): _ask("{question}\n{sentence}\nQuestion: Does this response answer the question?", "yes", "no"),
    ("rte", "lm-eval"): _ask("{sentence1}\nQuestion: {sentence2} True or False?", "True", "False"),
    ("wnli", "lm-eval"): _ask("{sentence1}\nQuestion: {sentence2} True or False?", "False", "True"),
    ("cb", "lm-eval"): _ask("{premise}\nQuestion: {hypothesis}. True, False, or Neither?", "True", "False", "Neither"),
    ("cb", "infill"): _infill("Yes", "No", "Also"),
}


def questions(task: Task, protocol: str, rows: Rows) -> list[Question]:
    """Every row of `rows` as `protocol` asks it. UserError if `task` cannot be asked so."""
    check_protocol(task, protocol)
    render = _hellaswag_question if task.name == "hellaswag" else _worded_question
    return [render(task, protocol, row) for row in rows.rows]


def check_protocol(task: Task, protocol: str) -> None:
    """UserError if `protocol` is none, or none that `task` has; it lists those that will do."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: {protocol!r} is not a protocol; choose of {', '.join(PROTOCOLS)}")
    if protocol not in task.protocols:
        raise UserError(f"protocol: {task.name} cannot be asked as {protocol}; choose of {', '.join(task.protocols)}")


def _hellaswag_question(task: Task, protocol: str, row: Row) -> Question:
    if protocol == "completion":
        context, endings = row["ctx"], row["endings"]
    else:
        text = _HELLASWAG[protocol]
        context = text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [text(ending) for ending in row["endings"]]
    scored = tuple(DELIMITER + ending for ending in endings)
    counted = len(DELIMITER) if protocol == "olmes" else 0
    return Question(
        task=task.name,
        id=row["id"],
        cluster=row[task.cluster],
        label=row["label"],
        context=context,
        endings=scored,
        characters=tuple(len(ending) + counted for ending in endings),
        unconditional="Answer:",
        stratum=(row["split_type"], row["source_id"].partition("~")[0], str(row["label"])),
    )


def _worded_question(task: Task, protocol: str, row: Row) -> Question:
    wording = _WORDINGS[task.name, protocol]
    columns = {**row, "statement": _statement(row.get("hypothesis", ""))}
    answers = [answer.format_map(columns) for answer in wording.answers]
    text = row[task.cluster] if task.cluster else f"{task.name}:{row['id']}"
    return Question(
        task=task.name,
        id=row["id"],
        cluster=hashlib.sha256(text.encode()).hexdigest()[:16],  # texts of a data set stay out of the results
        label=row["label"],
        context=wording.context.format_map(columns),
        endings=tuple(DELIMITER + answer for answer in answers),
        characters=tuple(map(len, answers)),
        unconditional=wording.unconditional,
        stratum=(task.choices[row["label"]] if task.choices else str(round(row["label"])),),
    )


def _statement(hypothesis: str) -> str:
    hypothesis = hypothesis.strip()
    return hypothesis if hypothesis.endswith(".") else hypothesis + "."


def true_ending(question: Question) -> str:
    """The ending that the label names; of a regression, the nearest score (halves to the even one)."""
    return question.endings[round(question.label)]
