"""The strings that are scored: each task under each protocol.

| protocol | what it is |
|---|---|
| completion | HellaSwag as build-nanogpt asks it: the raw `ctx`, each ending after one space |
| lm-eval | as lm-evaluation-harness 0.4.13 words it, quirks included: double spaces stay, two before COPA's endings |
| olmes | as OLMES does (arXiv 2406.08446), the answer's text scored; HellaSwag's titles end in one full stop, not two |
| question | SNLI in lm-eval's words for MNLI |
| infill | entailment as lm-eval asks XNLI: "premise, right? Yes, hypothesis", from "right?" on; texts as they are |
| microlm | STS-B, which lm-eval has not: our own words |
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from microlm.errors import UserError
from microlm.evaluation.tasks.data import Row, Rows
from microlm.evaluation.tasks.task import Task
from microlm.files import sha256_bytes

PROTOCOLS = ("completion", "lm-eval", "olmes", "question", "infill", "microlm")
DELIMITER = " "  # between a context and an ending
SCORES = tuple(map(str, range(6)))  # STS-B's endings
LETTERS = "ABCDE"

Columns = Mapping[str, Any]


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


@dataclass(frozen=True)
class Wording:
    """How a row becomes a question.

    Attributes:
        context: template over the columns.
        answers: templates, one for each label; () where the endings are the row's own.
        unconditional: the context that PMI sets against `context`.
        made: the row -> what the templates need besides or otherwise; of all columns `endings` are scored, and
            `openings`, where there are any, stand before them unscored.
    """

    context: str
    answers: tuple[str, ...] = ()
    unconditional: str = "Answer:"
    made: Callable[[Columns], Columns] = dict


def _ask(question: str, *answers: str, made: Callable[[Columns], Columns] = dict) -> Wording:
    return Wording(f"{question}\nAnswer:", answers, made=made)


def _infill(*openings: str) -> Wording:
    return Wording("{premise}, right?", tuple(f"{opening}, {{hypothesis}}" for opening in openings), "right?")


def _stated(row: Columns) -> Columns:
    """`statement`: the hypothesis with a full stop."""
    hypothesis = row["hypothesis"].strip()
    return {"statement": hypothesis if hypothesis.endswith(".") else hypothesis + "."}


def _lettered(row: Columns) -> Columns:
    """`options`: a line for each ending, headed by its letter."""
    lines = (f"{letter}. {ending}" for letter, ending in zip(LETTERS, row["endings"]))
    return {"question": row["question"].strip(), "options": "\n".join(lines)}


def _connected(row: Columns) -> Columns:
    """COPA as one sentence: the premise without its full stop, and endings that begin in lower case."""
    endings = [f" {ending[0].lower()}{ending[1:]}" for ending in row["endings"]]
    connective = {"cause": "because", "effect": "therefore"}[row["question"]]
    return {"begun": row["premise"].strip()[:-1], "connective": connective, "endings": endings}


def _filled(row: Columns) -> Columns:
    """WinoGrande by partial scoring: an option fills the blank unscored, and what follows it is scored.

    `pair`: twins, which differ in a word, have the same two options.
    """
    before, _, after = row["sentence"].partition("_")
    options = row["endings"]
    pair = "|".join(sorted(option.lower() for option in options))
    return {"before": before, "openings": options, "endings": [after.strip()] * len(options), "pair": pair}


def _last_word(row: Columns) -> Columns:
    before, _, word = row["text"].rpartition(" ")
    return {"before": before, "endings": [word]}


def _hellaswag(title: str) -> Wording:
    """With `title`, a pattern, for the end of a step's title, and without WikiHow's brackets."""

    def text(raw: str) -> str:
        return re.sub(r"\[.*?\]", "", re.sub(title, ". ", raw.strip())).replace("  ", " ")

    def made(row: Columns) -> Columns:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {"ctx": text(context), "endings": [text(ending) for ending in row["endings"]]}

    return Wording("{ctx}", made=made)


_SENTENCES = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
_TRUE_NEITHER_FALSE = _ask(
    "{premise}\nQuestion: {statement} True, False or Neither?", *("True", "Neither", "False"), made=_stated
)
_QUESTION = _ask("Question: {question}")
_PARTIAL = Wording("{before}", made=_filled)
_YES_OR_NO = _ask("{passage}\nQuestion: {question}?", "no", "yes")

WORDINGS: dict[tuple[str, str], Wording] = {
    ("hellaswag", "completion"): Wording("{ctx}"),
    ("hellaswag", "lm-eval"): _hellaswag(r" \[title\]"),
    ("hellaswag", "olmes"): _hellaswag(r"\.? \[title\]"),
    ("snli", "question"): _TRUE_NEITHER_FALSE,
    ("snli", "infill"): _infill("Yes", "Also", "No"),
    ("cola", "lm-eval"): _ask("{sentence}\nQuestion: Does this sentence make sense?", "no", "yes"),
    ("sst2", "lm-eval"): _ask("{sentence}\nQuestion: Is this sentence positive or negative?", "negative", "positive"),
    ("mrpc", "lm-eval"): _ask(_SENTENCES + "Question: Do both sentences mean the same thing?", "no", "yes"),
    ("stsb", "microlm"): _ask(
        _SENTENCES + "Question: From 0 (unrelated) to 5 (the same), how close in meaning are the sentences?", *SCORES
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
    ("arc_easy", "lm-eval"): _QUESTION,
    ("arc_easy", "olmes"): _QUESTION,
    ("arc_challenge", "lm-eval"): _QUESTION,
    ("arc_challenge", "olmes"): _QUESTION,
    ("piqa", "lm-eval"): _ask("Question: {goal}"),
    ("piqa", "olmes"): _ask("Goal: {goal}"),
    ("sciq", "lm-eval"): _ask("{support}\nQuestion: {question}", made=lambda row: {"support": row["support"].lstrip()}),
    ("sciq", "olmes"): _QUESTION,
    ("openbookqa", "lm-eval"): Wording("{question_stem}"),
    ("openbookqa", "olmes"): _ask("Question: {question_stem}"),
    ("winogrande", "lm-eval"): _PARTIAL,
    ("winogrande", "olmes"): _PARTIAL,
    ("social_iqa", "lm-eval"): Wording("Q: {context} {question}\nA:", unconditional="A:"),
    ("social_iqa", "olmes"): _ask("Question: {context} {question}"),
    ("commonsense_qa", "lm-eval"): _ask("Question: {question}\n{options}", *LETTERS, made=_lettered),
    ("commonsense_qa", "olmes"): _QUESTION,
    ("copa", "lm-eval"): Wording("{begun} {connective}", made=_connected),
    ("boolq", "lm-eval"): _YES_OR_NO,
    ("boolq", "olmes"): _YES_OR_NO,
    ("lambada_openai", "lm-eval"): Wording("{before}", made=_last_word),
}


def check_protocol(task: Task, protocol: str) -> None:
    """UserError if `protocol` is none, or none that `task` has; it lists those that will do."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: {protocol!r} is not a protocol; choose of {', '.join(PROTOCOLS)}")
    if protocol not in task.protocols:
        raise UserError(f"protocol: {task.name} cannot be asked as {protocol}; choose of {', '.join(task.protocols)}")


def questions(task: Task, protocol: str, rows: Rows) -> list[Question]:
    """Every row of `rows` as `protocol` asks it. UserError if `task` cannot be asked so."""
    check_protocol(task, protocol)
    return [_question(task, protocol, row) for row in rows.rows]


def _question(task: Task, protocol: str, row: Row) -> Question:
    wording = WORDINGS[task.name, protocol]
    columns = {**row, **wording.made(row)}
    answers = [answer.format_map(columns) for answer in wording.answers] or columns["endings"]
    counted = len(DELIMITER) if protocol == "olmes" else 0
    cluster = columns[task.cluster] if task.cluster else ""
    stratum = (task.choices[row["label"]] if task.choices else str(round(row["label"])),)
    if task.name == "hellaswag":
        stratum = (row["split_type"], cluster.partition("~")[0], *stratum)
    else:  # texts of a data set stay out of the results
        cluster = sha256_bytes((cluster or f"{task.name}:{row['id']}").encode())[:16]
    return Question(
        task=task.name,
        id=row["id"],
        cluster=cluster,
        label=row["label"],
        context=wording.context.format_map(columns),
        endings=tuple(DELIMITER + answer for answer in answers),
        characters=tuple(len(answer) + counted for answer in answers),
        unconditional=wording.unconditional,
        stratum=stratum,
        openings=tuple(columns.get("openings", ())),
    )


def true_ending(question: Question) -> str:
    """The ending that the label names, opening included; of a regression, the nearest score (halves: the even one)."""
    place = round(question.label)
    return "".join(question.openings[place : place + 1]) + question.endings[place]


def stratified_subset(questions: Sequence[Question], n: int) -> list[Question]:
    """The `n` questions that stand for all, in the order of their rows: the same for every model, machine and seed.

    Each stratum gives its share, rounded by largest remainder; within a stratum the questions come in the order of a
    hash of task and id. UserError if there are fewer than `n`.
    """
    if n > len(questions):
        raise UserError(
            f"{n} questions are asked for, and there are {len(questions)}; lower hellaswag_items or the benchmark's "
            "items in params.yaml, or --limit"
        )
    strata: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: sha256_bytes(f"{q.task}:{q.id}".encode())):
        strata[question.stratum].append(question)
    keys = sorted(strata)
    shares = {key: divmod(n * len(strata[key]), len(questions)) for key in keys}
    left = n - sum(whole for whole, _ in shares.values())
    rounded_up = set(sorted(keys, key=lambda key: (-shares[key][1], key))[:left])
    chosen = [question for key in keys for question in strata[key][: shares[key][0] + (key in rounded_up)]]
    return sorted(chosen, key=lambda question: int(question.id))
