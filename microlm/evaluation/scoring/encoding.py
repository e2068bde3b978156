"""Questions as token ids: what is read, what is scored, and what all of them have read before.

Context and ending are encoded as one text where a protocol says so (`joint`), by lm-evaluation-harness's rule: white
space at the end of the context goes to the ending, and the ending's ids are those of the whole text beyond as many as
the context alone has. Otherwise each is encoded by itself.

A few-shot prefix is always encoded together with the context, since its last line feed may join what follows. The ids
at the start that the questions then have in common are the shared prefix; a question that has others there, or that is
too long to keep them all, is read without it, its whole text in its own row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from microlm.errors import UserError
from microlm.evaluation.tasks.prompts import Question

CHUNK = 256  # questions whose texts are encoded at once: bounds the memory of a long prefix


class BatchEncoder(Protocol):
    """Texts to ids, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]: ...


@dataclass(frozen=True)
class Encoded:
    """A question in token ids, int64. Neither context nor endings are ever empty."""

    question: Question
    context: np.ndarray  # without the shared prefix where `shares_prefix`, else the whole of it
    endings: tuple[np.ndarray, ...]
    truncated: int = 0  # tokens of the context lost at the left
    shares_prefix: bool = True  # False: scored as if there were no prefix

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each ending."""
        return np.array([len(ending) for ending in self.endings])


@dataclass(frozen=True)
class Encoding:
    """All questions, and the ids [P] that those with `shares_prefix` have read before (P may be 0)."""

    questions: list[Encoded]
    prefix: np.ndarray

    @property
    def truncated(self) -> int:
        """Questions that lost tokens."""
        return sum(question.truncated > 0 for question in self.questions)

    @property
    def unshared(self) -> int:
        """Questions that are read without the shared prefix although there is one."""
        return sum(not question.shares_prefix for question in self.questions)


def encode(
    questions: Sequence[Question],
    tokenizer: BatchEncoder,
    context_limit: int,
    start_token: int | None = None,
    prefix: str = "",
    joint: bool = True,
    begin: Sequence[int] = (),
) -> Encoding:
    """Token ids of `questions` behind the few-shot text `prefix`.

    Args:
        context_limit: positions of the model; a longer question loses the start of its context.
        start_token: what a context without tokens becomes.
        joint: context and ending are one text to the tokenizer.
        begin: ids before everything else where it is `joint`, of models that expect a begin-of-text token.

    Raises:
        UserError: an ending has no token of its own, or alone fills `context_limit`; a context is empty and there is no
            start token. Each names task and question.
    """
    first = np.array(begin if joint else (), dtype=np.int64)
    chunks = (questions[start : start + CHUNK] for start in range(0, len(questions), CHUNK))
    read = [pair for chunk in chunks for pair in _ids(chunk, tokenizer, prefix, joint)]
    contexts = [_never_empty(np.concatenate([first, ids]), start_token, q) for (ids, _), q in zip(read, questions)]
    shared = first[:0]
    if prefix:
        shared = _shared(np.concatenate([first, *_encode(tokenizer, [prefix])]), contexts)
    endings = (ids for _, ids in read)
    return Encoding([_fit(*each, shared, context_limit) for each in zip(questions, contexts, endings)], shared)


def _encode(tokenizer: BatchEncoder, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]


def _ids(
    questions: Sequence[Question], tokenizer: BatchEncoder, prefix: str, joint: bool
) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """Ids of the context, few-shot text included, and of each ending."""
    whole = [prefix + question.context for question in questions]
    contexts = _encode(tokenizer, [text.rstrip() if joint else text for text in whole])
    # behind a context without a token there is nothing to be joined with: `whole` is then white space alone
    heads = whole if joint else [""] * len(whole)
    flat = iter(_encode(tokenizer, [head + ending for head, q in zip(heads, questions) for ending in q.endings]))
    starts = [len(ids) if joint else 0 for ids in contexts]
    return [(ids, tuple(next(flat)[start:] for _ in q.endings)) for ids, start, q in zip(contexts, starts, questions)]


def _never_empty(context: np.ndarray, start_token: int | None, question: Question) -> np.ndarray:
    if len(context):
        return context
    if start_token is None:
        raise UserError(
            f"{question.task} question {question.id} has an empty context, and the model's tokenizer names no token to "
            "start from; choose another protocol"
        )
    return np.array([start_token], np.int64)


def _shared(prefix: np.ndarray, contexts: Sequence[np.ndarray]) -> np.ndarray:
    """As much of `prefix` as saves the most tokens where every context that starts with it leaves it out.

    Each context keeps a token of its own, which predicts the first token of its endings.
    """
    common = np.array([_common(prefix, context[:-1]) for context in contexts], dtype=np.int64)
    lengths = np.unique(common)
    saved = [length * (np.count_nonzero(common >= length) - 1) for length in lengths]
    return prefix[: lengths[np.argmax(saved)]] if len(lengths) else prefix[:0]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens at the start in which `a` and `b` agree."""
    n = min(len(a), len(b))
    (differ,) = np.nonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _fit(
    question: Question, context: np.ndarray, endings: tuple[np.ndarray, ...], shared: np.ndarray, limit: int
) -> Encoded:
    for number, ending in enumerate(endings):
        if not len(ending):
            raise UserError(
                f"{question.task} question {question.id}: ending {number} has no token of its own behind its context; "
                "choose another protocol"
            )
    longest = max(len(ending) for ending in endings)
    room = limit - (longest - 1)  # the last token of an ending is predicted, never read
    if room < 1:
        raise UserError(
            f"{question.task} question {question.id} has an ending of {longest} tokens, the model only {limit} "
            "positions; choose a model of a longer context (of ours: model.context in params.yaml)"
        )
    lost = max(0, len(context) - room)
    if not lost and len(shared) and _common(shared, context[:-1]) == len(shared):
        return Encoded(question, context[len(shared) :], endings)
    return Encoded(question, context[lost:], endings, lost, shares_prefix=not len(shared))
