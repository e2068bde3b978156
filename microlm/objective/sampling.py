"""Responses sampled from a mixture of teacher and student, each model reading each token once."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from microlm.models.interface import LanguageModel


@runtime_checkable
class KeepsKeysAndValues(Protocol):
    """A language model that reads on where it stopped."""

    def extend(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """tokens [B, t] that follow those in `cache` (None: none) -> hidden states [B, t, D], the longer cache."""
        ...


class Reader:
    """A model over rows that grow: it reads what is new, or all of it again where it keeps no keys and values."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache: Any = None
        self._read = 0
        self._hidden: list[Tensor] = []

    def read(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], those read before and at least one more -> hidden states of all of them [B, T, D]."""
        if isinstance(self._model, KeepsKeysAndValues):
            hidden, self._cache = self._model.extend(tokens[:, self._read :], self._cache)
        else:
            hidden = self._model.hidden(tokens)[:, self._read :]
        self._read = tokens.shape[1]
        self._hidden.append(hidden)
        return hidden

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states of all of `tokens` [B, T, D], reading what is left of them."""
        if self._read < tokens.shape[1]:
            self.read(tokens)
        return torch.cat(self._hidden, dim=1)


@dataclass(frozen=True)
class Responses:
    """P prompt tokens, then S sampled ones, in each of R rows."""

    tokens: Tensor  # int64 [R, P + S]
    sampled: Tensor  # int64 [R, S]
    teacher_hidden: Tensor  # [R, S, D of the teacher], the states that predict the sampled tokens


def generator_of(seed: int, windows: np.ndarray) -> torch.Generator:
    """On the CPU, whatever the models' device, so that the same seed and windows give the same numbers everywhere."""
    digest = hashlib.sha256(f"{seed}:".encode() + np.ascontiguousarray(windows, dtype="<i8").tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens int64 [R] from softmax(logits [R, V]), each the inverse of its row's distribution function at a number
    in [0, 1): uniforms float64 [R]. The sum is float64, in float32 the rarest of 50,000 tokens would be lost to it.
    """
    mass = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(-1)
    tokens = torch.searchsorted(mass, (uniforms[:, None] * mass[:, -1:]), right=True)[:, 0]
    return tokens.clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample_responses(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Tensor,
    response_tokens: int,
    teacher_mix: float,
    generator: torch.Generator,
) -> Responses:
    """Sample from p~ = teacher_mix p + (1 - teacher_mix) q, token by token (Gu et al. 2024, arXiv:2306.08543, section
    2.2, teacher-mixed sampling).

    A coin of each position says who speaks there, the same for all rows. Every row by itself is a sample of p~, as if
    it had coins of its own, and the teacher runs only where it speaks, over all it has not read yet: the tokens of
    many positions at once. Rows are not independent of each other: an error bar is taken over calls.

    An end-of-text is a token like any other: what follows it is sampled and counted too, as the training windows also
    run on over the ends of documents.

    Args:
        prompts: int64 [R, P], on the models' device.
    """
    coins = torch.rand(response_tokens, generator=generator, dtype=torch.float64) < teacher_mix
    uniforms = torch.rand(response_tokens, len(prompts), generator=generator, dtype=torch.float64).to(prompts.device)
    readers = Reader(student), Reader(teacher)
    tokens = prompts
    for teacher_speaks, uniform in zip(coins.tolist(), uniforms):
        model = teacher if teacher_speaks else student
        hidden = readers[teacher_speaks].read(tokens)[:, -1]
        tokens = torch.cat((tokens, draw(head_logits(model, hidden), uniform)[:, None]), dim=1)
    first = prompts.shape[1] - 1
    teacher_hidden = readers[True].hidden(tokens[:, :-1])[:, first:]
    return Responses(tokens, tokens[:, first + 1 :], teacher_hidden)


def head_logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """hidden [..., D] -> logits [..., V], in the dtype of the head's weight: the student's is never rounded."""
    return model.logits(hidden.to(model.head_weight.dtype))
