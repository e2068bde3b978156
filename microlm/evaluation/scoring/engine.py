"""Score the endings of many questions on a live language model, each context and the few-shot prefix read once."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from microlm.errors import UserError, plain
from microlm.evaluation.scoring.backends import Measure, nats_by
from microlm.evaluation.scoring.encoding import Encoded
from microlm.evaluation.scoring.held_out_loss import scoring
from microlm.evaluation.tasks.prompts import Question
from microlm.models.interface import LanguageModel
from microlm.runtime import distributed

# Nats that rounding explains on the trial, over the root of an ending's tokens: it adds up like a random walk. Measured
# with SmolLM2 in bfloat16, in units of its eps: both ways are off by 8 (rms) and at most by 29, positions that are not
# heeded by 130, a mask by 1,000. In float32, by 0.00003, 1.0 and 8 nats
ROUNDING_EPS, ROUNDING_NATS = 64, 5e-4
TRIAL_PREFIX, TRIAL_CONTEXT, TRIAL_ENDINGS = 6, 9, (7, 5, 7, 1, 7, 7)  # tokens
TRIAL_TOKENS = 1024  # one batch holds both questions
PREFERENCE = ("tree", "cached", "plain")  # the fastest first; the last one takes every model
NO_PREFIX = np.array([], dtype=np.int64)


def score(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray = NO_PREFIX,
    progress: Callable[[int], object] = int,
    name: str = "the model",
    backend: str = "auto",
    together: bool = False,
    measure: Measure | None = None,
    used: Counter[str] | None = None,
) -> list[np.ndarray]:
    """Summed nats of each question's endings, float64, in order. No gradient, no random number, the model's mode kept.

    Args:
        batch_tokens: tokens in one forward pass, padding included.
        prefix: int64 [P], read once before all questions that share it (`Encoding.prefix`).
        progress: called after each batch with the number of questions it held, e.g. `tqdm.update`.
        name: of the model, for the error message.
        backend: `tree`, `cached`, `plain` (see backends.py) or `auto`, which is `choose_backend`'s.
        measure: what is summed in place of nats, e.g. `backends.missed`.
        used: counts the questions by the backend that scores them, for a report.
        together: whole batches are dealt to the processes, which all call this, and each gets all: the bits of one.

    Raises:
        UserError: a score is not a finite number; names the model, the task and the question.
    """
    nats = [np.zeros(len(item.endings)) for item in encoded]
    deal, waiting, limit = (distributed.dealt if together else list), len(encoded), _uniform_context(model)
    parts: dict[tuple[bool, bool], list[int]] = {}
    for index, question in enumerate(encoded):
        shared = len(prefix) if question.shares_prefix else 0
        length = shared + len(question.context) + question.lengths.max() - 1
        parts.setdefault((shared > 0, length > limit), []).append(index)
    with scoring(model):
        for (shares, beyond), members in sorted(parts.items(), reverse=True):
            way = "plain" if beyond else _chosen(model, shares, name) if backend == "auto" else backend
            if together:  # batches of one kind, else some would be scored by none
                way = PREFERENCE[distributed.largest(PREFERENCE.index(way))]
            if used is not None:
                used[way] += len(members)
            questions, before = [encoded[i] for i in members], prefix if shares else NO_PREFIX
            for indices, values in nats_by(way, model, questions, batch_tokens, before, deal, measure):
                for index, value in zip(indices, values):
                    nats[members[index]] = _finite(value, questions[index], name)
                waiting -= len(indices)
                progress(len(indices))
    if not together or distributed.size() == 1:
        return nats
    progress(waiting)  # those of the others
    whole = distributed.sum_over_ranks(torch.from_numpy(np.concatenate(nats)))  # each is of one process, so exact
    return np.split(whole.numpy(), np.cumsum([len(values) for values in nats])[:-1])


class Choice(NamedTuple):
    backend: str
    why: str  # faster ones were passed over; empty where there are none


def choose_backend(model: LanguageModel, after_prefix: bool = False) -> Choice:
    """The first of `tree` and `cached` that scores two questions in either order as `plain` does alone; else `plain`.

    Costs some twenty short passes. A model of relative positions by distance in the row (ALiBi) is no good for `tree`;
    one that keeps something else than keys and values is good for `plain` alone. Of a model that hardly heeds its
    context a fault may pass for rounding: it then moves scores by as little.
    """
    questions, prefix = _trial(model.n_vocab, after_prefix)
    if len(prefix) + TRIAL_CONTEXT + max(TRIAL_ENDINGS) > _uniform_context(model):
        return Choice("plain", "its context is too short to try a faster way")
    told: list[str] = []
    with scoring(model) as device:
        expected = _in_order("plain", model, questions, prefix)
        if not np.isfinite(expected).all():
            return Choice("plain", "")  # whose scores will be refused
        eps = torch.finfo(model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device)).dtype).eps
        allowed = max(ROUNDING_EPS * eps, ROUNDING_NATS) * np.sqrt(TRIAL_ENDINGS)
        for backend in PREFERENCE[:-1]:
            try:
                either = (_in_order(backend, model, questions[::step], prefix)[::step] for step in (1, -1))
                off = np.abs(np.stack(list(either)) - expected)
            except Exception as error:  # each network has an error of its own for an input that it does not take
                told.append(f"`{backend}` ends in {type(error).__name__}")
                continue
            if (off <= allowed).all():
                return Choice(backend, "; ".join(told))
            worst = np.unravel_index(np.argmax(off / allowed), off.shape)
            told.append(
                f"`{backend}` is off by {off[worst]:.2g} nats on an ending, rounding explains {allowed[worst[-1]]:.2g}"
            )
    return Choice("plain", "; ".join(told))


def _in_order(backend: str, model: LanguageModel, questions: Sequence[Encoded], prefix: np.ndarray) -> np.ndarray:
    """Nats [questions, endings] of questions that have as many endings, scored in one batch."""
    batches = nats_by(backend, model, questions, TRIAL_TOKENS, prefix)
    nats = dict(found for indices, values in batches for found in zip(indices, values))
    return np.stack([nats[index] for index in range(len(questions))])


def _chosen(model: LanguageModel, shares: bool, name: str) -> str:
    """`choose_backend`'s; one that is not the fastest is told on stderr."""
    way, why = choose_backend(model, shares)
    if why:
        _warn(f"{name} is scored by `{way}`{', one ending at a time' * (way == 'plain')}: {why}")
    return way


@cache
def _warn(line: str) -> None:
    """Once a process, past a progress bar."""
    if distributed.is_first():
        tqdm.write(plain(f"warning: {line}"), file=sys.stderr)


def _trial(n_vocab: int, after_prefix: bool) -> tuple[tuple[Encoded, Encoded], np.ndarray]:
    """Endings that repeat each other's tokens, so that one which sees another is scored far too well; the same counted
    backwards is the second question.
    """
    lengths = (TRIAL_PREFIX, TRIAL_CONTEXT, max(TRIAL_ENDINGS))
    prefix, *forwards = np.split((7 + 11 * np.arange(sum(lengths))) % n_vocab, np.cumsum(lengths)[:-1])
    backwards = [(n_vocab - 1 - ids) % n_vocab for ids in forwards]
    question = Question("trial", "made up", "", 0, "", ("",) * len(TRIAL_ENDINGS), (), "", ())
    asked = (
        Encoded(question, context, tuple(ending[:n] for n in TRIAL_ENDINGS))
        for context, ending in (forwards, backwards)
    )
    return tuple(asked), prefix if after_prefix else NO_PREFIX


def _uniform_context(model: LanguageModel) -> int:
    """Tokens up to which a mask or a prefix from outside changes nothing in what a layer sees."""
    return getattr(model, "uniform_context", model.context)


def _finite(nats: np.ndarray, encoded: Encoded, name: str) -> np.ndarray:
    if not np.isfinite(nats).all():
        raise UserError(
            f"{name} gives {encoded.question.task} question {encoded.question.id} a score that is not a finite number: "
            "its weights are broken or overflow; set runtime.dtype: float32 in params.yaml, or make the model again"
        )
    return nats
