"""How each task is worded under each protocol: templates over a row's columns, and what is made of the columns first.

HellaSwag is worded in prompts.py. What is headed lm-eval is as lm-evaluation-harness 0.4.13 has it, quirks included:
COPA's endings begin with two spaces, SciQ's context with a line feed where there is no passage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SCORES = tuple(map(str, range(6)))  # STS-B's endings
LETTERS = "ABCDE"

Columns = Mapping[str, Any]


def _as_published(row: Columns) -> Columns:
    return row


@dataclass(frozen=True)
class Wording:
    """How a row becomes a question.

    Attributes:
        context: template over the columns.
        answers: templates, one for each label; () where the endings are the row's own.
        unconditional: the context that PMI sets against `context`.
        made: the row -> its columns, those that the templates need besides added; of them `endings` are scored, and
            `openings`, where there are any, stand before them unscored.
    """

    context: str
    answers: tuple[str, ...] = ()
    unconditional: str = "Answer:"
    made: Callable[[Columns], Columns] = _as_published


def _ask(question: str, *answers: str, made: Callable[[Columns], Columns] = _as_published) -> Wording:
    return Wording(f"{question}\nAnswer:", answers, made=made)


def _infill(*openings: str) -> Wording:
    return Wording("{premise}, right?", tuple(f"{opening}, {{hypothesis}}" for opening in openings), "right?")


def _stated(row: Columns) -> Columns:
    """`statement`: the hypothesis with a full stop."""
    hypothesis = row["hypothesis"].strip()
    return {**row, "statement": hypothesis if hypothesis.endswith(".") else hypothesis + "."}


def _passage_first(row: Columns) -> Columns:
    return {**row, "support": row["support"].lstrip()}


def _lettered(row: Columns) -> Columns:
    """`options`: a line for each ending, headed by its letter."""
    lines = (f"{letter}. {ending}" for letter, ending in zip(LETTERS, row["endings"]))
    return {**row, "question": row["question"].strip(), "options": "\n".join(lines)}


_CONNECTIVES = {"cause": "because", "effect": "therefore"}


def _connected(row: Columns) -> Columns:
    """COPA as one sentence: the premise without its full stop, and endings that begin in lower case."""
    endings = [f" {ending[0].lower()}{ending[1:]}" for ending in row["endings"]]
    connective = _CONNECTIVES[row["question"]]
    return {**row, "begun": row["premise"].strip()[:-1], "connective": connective, "endings": endings}


def _filled(row: Columns) -> Columns:
    """WinoGrande by partial scoring: an option fills the blank unscored, and what follows it is scored.

    `pair`: twins, which differ in a word, have the same two options.
    """
    before, _, after = row["sentence"].partition("_")
    openings = row["endings"]
    pair = "|".join(sorted(option.lower() for option in openings))
    return {**row, "before": before, "openings": openings, "endings": [after.strip()] * len(openings), "pair": pair}


def _last_word(row: Columns) -> Columns:
    before, _, word = row["text"].rpartition(" ")
    return {**row, "before": before, "endings": [word]}


_SENTENCES = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
_TRUE_NEITHER_FALSE = _ask(
    "{premise}\nQuestion: {statement} True, False or Neither?", *("True", "Neither", "False"), made=_stated
)
_QUESTION = _ask("Question: {question}")
_PARTIAL = Wording("{before}", made=_filled)
_YES_OR_NO = _ask("{passage}\nQuestion: {question}?", "no", "yes")

WORDINGS: dict[tuple[str, str], Wording] = {
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
    ("sciq", "lm-eval"): _ask("{support}\nQuestion: {question}", made=_passage_first),
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
