"""The strings that are scored: each task under each protocol.

| protocol | what it is |
|---|---|
| completion | HellaSwag as build-nanogpt asks it: the raw `ctx`, each ending after one space |
| lm-eval | as lm-evaluation-harness 0.4.13 words it, double spaces included |
| olmes | as OLMES does (arXiv 2406.08446), the answer's text scored; HellaSwag's titles end in one full stop, not two |
| question | SNLI in lm-eval's words for MNLI |
| infill | entailment as lm-eval asks XNLI: "premise, right? Yes, hypothesis", from "right?" on; texts as they are |
| microlm | STS-B, which lm-eval has not: our own words |
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from microlm.errors import UserError
from microlm.evaluation.tasks.data import Rows
from microlm.evaluation.tasks.formats import Row
from microlm.evaluation.tasks.task import Task
from microlm.evaluation.tasks.wordings import WORDINGS

PROTOCOLS = ("completion", "lm-eval", "olmes", "question", "infill", "microlm")
DELIMITER = " "  # between a context and an ending


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
        openings: what each ending has between `context` and itself, unscored; () where they all follow `context`.
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
    openings: tuple[str, ...] = ()

    def read(self) -> tuple["Question", ...]:
        """The question as it is read: once, or once for each ending where each has a context of its own."""
        if not self.openings:
            return (self,)
        return tuple(
            replace(self, context=self.context + opening, endings=(ending,), characters=(size,), openings=())
            for opening, ending, size in zip(self.openings, self.endings, self.characters)
        )


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
    wording = WORDINGS[task.name, protocol]
    columns = wording.made(row)
    answers = [answer.format_map(columns) for answer in wording.answers] or columns["endings"]
    counted = len(DELIMITER) if protocol == "olmes" else 0
    text = columns[task.cluster] if task.cluster else ""
    return Question(
        task=task.name,
        id=row["id"],
        # texts of a data set stay out of the results
        cluster=hashlib.sha256((text or f"{task.name}:{row['id']}").encode()).hexdigest()[:16],
        label=row["label"],
        context=wording.context.format_map(columns),
        endings=tuple(DELIMITER + answer for answer in answers),
        characters=tuple(len(answer) + counted for answer in answers),
        unconditional=wording.unconditional,
        stratum=(task.choices[row["label"]] if task.choices else str(round(row["label"])),),
        openings=tuple(columns.get("openings", ())),
    )


def true_ending(question: Question) -> str:
    """The ending that the label names, opening included; of a regression, the nearest score (halves: the even one)."""
    place = round(question.label)
    return "".join(question.openings[place : place + 1]) + question.endings[place]
