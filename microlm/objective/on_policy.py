"""MiniLLM: the reverse KL of whole responses, KL(q(y|x) || p(y|x)), by policy gradient (Gu et al. 2024,
arXiv:2306.08543, section 2.2).

Student q, teacher p, response y of S tokens to a prompt x, r_t = log p(y_t) - log q(y_t), each given x and y_<t. The
gradient is an expectation over y ~ q of a sum over t of two parts (single-step decomposition):

    single step   grad KL(q(. | y_<t) || p(. | y_<t)), summed exactly over the vocabulary
    long term     - R_{t+1} grad log q(y_t),  R_{t+1} = sum_{t' > t} r_t'

The teacher is live: a cache of the training windows knows nothing of sampled text.

Shapes: R responses, P tokens of a prompt, S of a response, V vocabulary, D hidden size.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch
from microlm.errors import UserError
from microlm.models.interface import LanguageModel
from microlm.objective.divergences import mixture
from microlm.parameters import OnPolicyConfig


class Responses(NamedTuple):
    """Sampled from a mixture of teacher and student."""

    tokens: Tensor  # int64 [R, P + S], prompt and response
    teacher_hidden: Tensor  # [R, S, D of the teacher], the states that predict the sampled tokens


class ScoredResponses(NamedTuple):
    """What both models say of sampled responses. Student's numbers carry their gradient."""

    single_step: Tensor  # [R, S] KL(q || p) of the next token, nats
    log_q: Tensor  # [R, S] of the sampled tokens
    log_p: Tensor  # [R, S] of the sampled tokens


class MiniLLMLoss(NamedTuple):
    """`surrogate` is there for its gradient, its value means nothing. `reverse_kl` is what falls when it works."""

    surrogate: Tensor
    reverse_kl: Tensor  # KL(q || p) of the next token, mean over the responses' tokens, nats; detached


class MiniLLM:
    """The on-policy term of a batch: prompts from its windows, responses sampled, both models' scores, the surrogate.

    Logits exist at the responses' positions alone: with both models, the softmax and the gradient about 6 R S V floats.

    Args:
        teacher: in evaluation mode, with the student's vocabulary.
        seed: with the batch's windows, and the two models, it fixes the responses.

    Raises:
        UserError: prompt and response are longer than one of the models reads.
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel, settings: OnPolicyConfig, seed: int) -> None:
        length, context = settings.prompt_tokens + settings.response_tokens, min(student.context, teacher.context)
        if length > context:
            raise UserError(
                f"params.yaml: on_policy.response_tokens: prompt_tokens + response_tokens = {length} is more than the "
                f"models' context of {context}; lower one of them"
            )
        self._models, self._settings, self._seed = (student, teacher), settings, seed

    def __call__(self, batch: Batch) -> MiniLLMLoss:
        """Answers the first `prompt_tokens` tokens of the first `prompts` windows, or of all where there are fewer."""
        settings, generator = self._settings, generator_of(self._seed, batch.windows)
        prompts = batch.tokens[: settings.prompts, : settings.prompt_tokens].to(self._models[0].head_weight.device)
        responses = sample_responses(*self._models, prompts, settings.response_tokens, settings.teacher_mix, generator)
        scored = score(*self._models, responses)
        surrogate = minillm_surrogate(scored, settings.teacher_mix, settings.clip)
        return MiniLLMLoss(surrogate, scored.single_step.detach().mean())


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
    readers, tokens = (Reader(student), Reader(teacher)), prompts
    for teacher_speaks, uniform in zip(coins.tolist(), uniforms):
        speaker = readers[teacher_speaks]
        drawn = draw(_head_logits(speaker.model, speaker.read(tokens)[:, -1]), uniform)
        tokens = torch.cat((tokens, drawn[:, None]), dim=1)
    return Responses(tokens, readers[True].hidden(tokens[:, :-1])[:, -response_tokens:])


@dataclass
class Reader:
    """A model over rows that grow, of whose tokens it reads each once."""

    model: LanguageModel
    _cache: Any = None
    _read: int = 0
    _hidden: list[Tensor] = field(default_factory=list)

    def read(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], those read before and n >= 1 more -> hidden states of these [B, n, D]."""
        hidden, self._cache = self.model.extend(tokens[:, self._read :], self._cache)
        self._read = tokens.shape[1]
        self._hidden.append(hidden)
        return hidden

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states of all of `tokens` [B, T, D], reading what is left of them."""
        if self._read < tokens.shape[1]:
            self.read(tokens)
        return torch.cat(self._hidden, dim=1)


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


def score(student: LanguageModel, teacher: LanguageModel, responses: Responses) -> ScoredResponses:
    """One pass of the student with a gradient; the teacher's states are those it sampled from."""
    length = responses.teacher_hidden.shape[1]
    log_q = _log_probabilities(student, student.hidden(responses.tokens[:, :-1])[:, -length:])
    with torch.no_grad():
        log_p = _log_probabilities(teacher, responses.teacher_hidden)
    single_step = (log_q.exp() * (log_q - log_p)).sum(-1)
    chosen = responses.tokens[:, -length:, None]
    return ScoredResponses(single_step, log_q.gather(-1, chosen)[..., 0], log_p.gather(-1, chosen)[..., 0])


def minillm_surrogate(
    scored: ScoredResponses, teacher_mix: float, clip: float, length_normalized: bool = True
) -> Tensor:
    """A scalar whose gradient is the paper's estimate, mean over the responses' tokens.

    Responses are samples of p~ = teacher_mix p + (1 - teacher_mix) q. The importance weight of a token is the ratio
    w_t = q(y_t) / p~(y_t) of that token alone: the paper's approximation to the product of all ratios up to it. The
    single-step part, where y_t is summed out, keeps no weight: E[w_t] = 1 whatever came before (the paper writes w_t
    there too, its code does not). R_{t+1} is divided by the number of its terms, S - t (length normalization), and is
    0 for the last token.

    Clipping is PPO's (Schulman et al. 2017, arXiv:1707.06347, eq. 7). Each sample serves one update, so that the ratio
    of new to old policy is 1 and the clipped ratio is w_t: the long-term part of a token is
    - min(w_t A, clamp(w_t, 1 - clip, 1 + clip) A) with A the normalized R_{t+1}. So where A > 0 and w_t > 1 + clip, or
    A < 0 and w_t < 1 - clip, the token's long-term gradient is zero; elsewhere it is - w_t A grad log q(y_t), with w_t
    as it is. As w_t <= 1 / (1 - teacher_mix), a teacher_mix of 0.2 keeps it below 1.25.

    The authors' code also whitens the returns over the batch, scales and clips the rewards and lets R start at t, where
    the single-step part is counted already; the paper's gradient, which this is, has none of that.

    Args:
        clip: math.inf never clips.
    """
    log_q = scored.log_q.detach()
    returns = returns_after(scored.log_p - log_q)
    if length_normalized:
        returns = returns / torch.arange(returns.shape[1] - 1, -1, -1, device=returns.device).clamp_min(1)
    ratio = torch.exp(scored.log_q - mixture(scored.log_p, log_q, teacher_mix))
    gain = torch.minimum(ratio * returns, ratio.clamp(1 - clip, 1 + clip) * returns)
    return (scored.single_step - gain).mean()


def returns_after(rewards: Tensor) -> Tensor:
    """[R, S] -> [R, S]: at t the sum of the rewards after t, 0 at the last."""
    later = torch.cat((rewards[:, 1:], torch.zeros_like(rewards[:, :1])), dim=1)
    return later.flip(1).cumsum(1).flip(1)


def _log_probabilities(model: LanguageModel, hidden: Tensor) -> Tensor:
    logits = _head_logits(model, hidden)
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _head_logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """hidden [..., D] -> logits [..., V], in the dtype of the head's weight: the student's is never rounded."""
    return model.logits(hidden.to(model.head_weight.dtype))
