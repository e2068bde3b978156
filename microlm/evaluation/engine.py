"""Score the endings of many questions on a live language model, each context and the few-shot prefix read once."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from microlm import distributed
from microlm.errors import UserError
from microlm.evaluation.backends import BACKENDS, every
from microlm.evaluation.encoding import Encoded
from microlm.evaluation.prompts import Question
from microlm.language_model import LanguageModel

# how far a backend's nats may be from the reference's on the trial question, relative: rounding alone stays below,
# a mask or positions that the model takes for something else do not
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4}
CLOSE_IN_HALF = 1e-2
TRIAL_PREFIX, TRIAL_CONTEXT, TRIAL_ENDINGS = 6, 9, (7, 5, 1)  # tokens
PREFERENCE = ("tree", "cached", "plain")  # the fastest first; the last one takes every model
NO_PREFIX = np.array([], dtype=np.int64)


def score(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    prefix: np.ndarray | None = None,
    progress: Callable[[int], object] | None = None,
    name: str = "the model",
    backend: str = "auto",
    together: bool = False,
) -> list[np.ndarray]:
    """Summed nats of each question's endings, float64, in order. No gradient, no random number, the model's mode kept.

    Args:
        batch_tokens: tokens in one forward pass, padding included.
        prefix: int64 [P], read once before all questions that share it (`Encoding.prefix`).
        progress: called after each batch with the number of questions it held, e.g. `tqdm.update`.
        name: of the model, for the error message.
        backend: `tree`, `cached`, `plain` (see backends.py) or `auto`, which is `choose_backend`'s.
        together: whole batches are dealt to the processes, which all call this, and each gets all: the bits of one.

    Raises:
        UserError: a score is not a finite number; names the model, the task and the question.
    """
    before = NO_PREFIX if prefix is None else prefix
    nats = [np.zeros(len(item.endings)) for item in encoded]
    deal, waiting = (distributed.dealt if together else every), len(encoded)
    with _scoring(model):
        for part in _parts(model, encoded, before, backend, together):
            questions = [encoded[i] for i in part.members]
            for indices, values in BACKENDS[part.backend](model, questions, batch_tokens, part.prefix, deal):
                for index, value in zip(indices, values):
                    nats[part.members[index]] = _finite(value, questions[index], name)
                waiting -= len(indices)
                if progress is not None:
                    progress(len(indices))
    if not together or distributed.size() == 1:
        return nats
    if progress is not None:
        progress(waiting)  # those of the others
    whole = distributed.sum_over_ranks(torch.from_numpy(np.concatenate(nats)))  # each is of one process, so exact
    return np.split(whole.numpy(), np.cumsum([len(values) for values in nats])[:-1])


def score_plain(
    model: LanguageModel, encoded: Sequence[Encoded], prefix: np.ndarray | None = None, name: str = "the model"
) -> list[np.ndarray]:
    """The reference for `score`: one ending at a time after its context, no batch, no padding, no mask."""
    return score(model, encoded, 1, prefix, name=name, backend="plain")


def backends_used(
    model: LanguageModel, encoded: Sequence[Encoded], prefix: np.ndarray | None = None, backend: str = "auto"
) -> dict[str, int]:
    """Questions by the backend that `score` takes for them, for a report. The same choice as `score`'s."""
    counts: Counter[str] = Counter()
    with _scoring(model):
        for part in _parts(model, encoded, NO_PREFIX if prefix is None else prefix, backend):
            counts[part.backend] += len(part.members)
    return dict(counts)


def choose_backend(model: LanguageModel, after_prefix: bool = False) -> str:
    """The first of `tree` and `cached` that scores a made-up question as `plain` does, else `plain`.

    Costs some ten short passes. A model of relative positions by distance in the row (ALiBi) is no good for `tree`; one
    that keeps something else than keys and values is good for `plain` alone.
    """
    question, prefix = _trial(model.n_vocab, after_prefix)
    if len(prefix) + len(question.context) + max(TRIAL_ENDINGS) > _uniform_context(model):
        return "plain"
    with _scoring(model) as device:
        dtype = model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device)).dtype
        ((_, (expected,)),) = BACKENDS["plain"](model, [question], 1, prefix)
        for backend in ("tree", "cached"):
            try:
                ((_, (nats,)),) = BACKENDS[backend](model, [question], 1, prefix)
            except Exception:  # each network has an error of its own for an input that it does not take
                continue
            if np.allclose(nats, expected, rtol=CLOSE.get(dtype, CLOSE_IN_HALF), atol=0):
                return backend
    return "plain"


def _trial(n_vocab: int, after_prefix: bool) -> tuple[Encoded, np.ndarray]:
    """Endings that repeat each other's tokens, so that one which sees another is scored far too well."""
    lengths = (TRIAL_PREFIX, TRIAL_CONTEXT, max(TRIAL_ENDINGS))
    ids = (7 + 11 * np.arange(sum(lengths))) % n_vocab
    prefix, context, ending = np.split(ids, np.cumsum(lengths)[:-1])
    question = Question("trial", "made up", "", 0, "", ("",) * len(TRIAL_ENDINGS), (), "", ())
    return Encoded(question, context, tuple(ending[:n] for n in TRIAL_ENDINGS)), prefix if after_prefix else NO_PREFIX


class _Part(NamedTuple):
    """Questions that one backend scores behind one prefix."""

    backend: str
    prefix: np.ndarray
    members: list[int]


def _parts(
    model: LanguageModel, encoded: Sequence[Encoded], prefix: np.ndarray, backend: str, together: bool = False
) -> list[_Part]:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}, auto")
    limit = _uniform_context(model)
    parts: dict[tuple[bool, bool], list[int]] = {}
    for index, question in enumerate(encoded):
        shared = len(prefix) if question.shares_prefix else 0
        length = shared + len(question.context) + max(len(ending) for ending in question.endings) - 1
        parts.setdefault((shared > 0, length > limit), []).append(index)
    made = []
    for (shares, beyond), members in sorted(parts.items(), reverse=True):
        chosen = "plain" if beyond else choose_backend(model, shares) if backend == "auto" else backend
        if together:  # batches of one kind, else some would be scored by none
            chosen = PREFERENCE[distributed.largest(PREFERENCE.index(chosen))]
        made.append(_Part(chosen, prefix if shares else NO_PREFIX, members))
    return made


def _uniform_context(model: LanguageModel) -> int:
    """Tokens up to which a mask or a prefix from outside changes nothing in what a layer sees."""
    return getattr(model, "uniform_context", model.context)


@contextmanager
def _scoring(model: LanguageModel) -> Iterator[torch.device]:
    """Inference mode and evaluation mode; afterwards each module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield next(iter(model.parameters())).device
    finally:
        for module, training in modes:
            module.training = training


def _finite(nats: np.ndarray, encoded: Encoded, name: str) -> np.ndarray:
    if not np.isfinite(nats).all():
        raise UserError(
            f"{name} gives {encoded.question.task} question {encoded.question.id} a score that is not a finite number: "
            "its weights are broken or overflow; set runtime.dtype: float32 in params.yaml, or make the model again"
        )
    return nats
