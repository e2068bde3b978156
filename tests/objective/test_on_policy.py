"""MiniLLM against the exact gradient of the sequence-level reverse KL, where every response can be listed."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from microlm.corpus.batches import Batch
from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.model_files import TransformersModel
from microlm.models.student import StudentLM
from microlm.objective.divergences import mixture
from microlm.objective.on_policy import (
    MiniLLM,
    Reader,
    ScoredResponses,
    draw,
    generator_of,
    minillm_surrogate,
    returns_after,
    sample_responses,
    score,
)
from microlm.parameters import OnPolicyConfig
from tests.support.tiny_teacher import tiny_llama

V, LENGTH = 3, 3  # symbols, tokens of a response; a prompt is one token
CALLS, ROWS = 400, 24  # samples of the estimate, responses to each prompt in one of them


class Forgetful(nn.Module):
    """A language model that keeps no keys and values: it reads all again."""

    def extend(self, tokens: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = tokens if read is None else torch.cat((read, tokens), 1)
        return self.hidden(whole)[:, -tokens.shape[1] :], whole


class Table(Forgetful):
    """A language model with logits of its own for every prefix of up to LENGTH tokens, and one row of padding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.n_vocab, self.context = V, LENGTH + 1
        self.states = sum(V**length for length in range(1, LENGTH + 1))
        logits = torch.randn(V, self.states, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.head_weight = nn.Parameter(torch.cat((logits, torch.full((1, self.states), 50.0, dtype=torch.float64))))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        code, first, columns = torch.zeros_like(tokens[:, 0]), 0, []
        for length, column in enumerate(tokens.T, start=1):
            code = code * V + column
            columns.append(first + code)
            first += V**length
        return nn.functional.one_hot(torch.stack(columns, 1), self.states).to(self.head_weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head_weight[:V].T


STUDENT, TEACHER = Table(1), Table(2)
PROMPTS = torch.arange(V)[:, None]


def listed(length: int = LENGTH) -> Tensor:
    """Every prompt with every response, [V * V^length, 1 + length]."""
    return torch.tensor(list(product(range(V), repeat=1 + length)))


def log_probability(model: Table, tokens: Tensor) -> Tensor:
    """Of the whole response, [rows]."""
    log_q = torch.log_softmax(model.logits(model.hidden(tokens[:, :-1])), -1)
    return log_q.gather(-1, tokens[:, 1:, None]).sum((1, 2))


def exact_gradient(student: Table, teacher: Table, length: int = LENGTH) -> Tensor:
    log_q, log_p = (log_probability(model, listed(length)) for model in (student, teacher))
    return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum() / V, student.head_weight)[0]


def estimates(student: Table, teacher: Table, mix: float, surrogate: Callable[[ScoredResponses], Tensor]) -> Tensor:
    """Gradients of the surrogate, summed over a response's tokens, one of each call: [CALLS, V + 1, states]."""
    prompts, gradients = PROMPTS.repeat(ROWS, 1), []
    for call in range(CALLS):
        generator = torch.Generator().manual_seed(call)
        responses = sample_responses(student, teacher, prompts, LENGTH, mix, generator)
        loss = LENGTH * surrogate(score(student, teacher, responses))
        gradients.append(torch.autograd.grad(loss, student.head_weight)[0])
    return torch.stack(gradients)


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """Of every coordinate that belongs to a real token; padding has no gradient at all."""
    assert (samples[:, V:] == 0).all()
    error = samples.std(0) / len(samples) ** 0.5
    return ((samples.mean(0) - expected) / error)[:V].flatten()


def agrees(z: Tensor) -> bool:
    """Whether z-scores look standard normal. One coin serves all rows, so they depend on each other: z^2 is wide."""
    return bool(z.abs().max() < 4.5 and 0.4 < z.square().mean() < 1.8)


def unbiased_surrogate(scored: ScoredResponses, teacher_mix: float) -> Tensor:
    """A scalar whose expected gradient, times S, is that of KL(q(y|x) || p(y|x)), mean over prompts: the oracle.

    Each term is weighted by the product of the ratios of all tokens that it depends on (Precup et al. 2000,
    per-decision importance sampling): the single-step part at t by those before t, a reward r_t' by those up to t'.
    Their variance grows exponentially with S, which is why training takes `minillm_surrogate`.
    """
    log_q = scored.log_q.detach()
    log_weights = (log_q - mixture(scored.log_p, log_q, teacher_mix)).cumsum(1)
    before = torch.cat((torch.zeros_like(log_weights[:, :1]), log_weights[:, :-1]), dim=1)
    returns = returns_after(log_weights.exp() * (scored.log_p - log_q))
    return (before.exp() * scored.single_step - scored.log_q * returns).mean()


def paper(mix: float) -> Callable[[ScoredResponses], Tensor]:
    return lambda scored: minillm_surrogate(scored, mix, math.inf, length_normalized=False)


@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_expected_gradient_is_that_of_the_sequence_level_reverse_kl(mix):
    samples = estimates(STUDENT, TEACHER, mix, lambda scored: unbiased_surrogate(scored, mix))
    assert agrees(z_scores(samples, exact_gradient(STUDENT, TEACHER)))


def test_the_papers_estimate_is_unbiased_without_mixing_clipping_and_normalization():
    samples = estimates(STUDENT, TEACHER, 0.0, paper(0.0))
    assert agrees(z_scores(samples, exact_gradient(STUDENT, TEACHER)))


@pytest.mark.parametrize(
    ("mix", "wrong"),
    [
        (0.0, lambda scored: scored.single_step.mean()),  # no long-term part
        (0.0, lambda scored: 2 * scored.single_step.mean() - paper(0.0)(scored)),  # the wrong sign of it
        (0.2, paper(0.0)),  # no importance weights
    ],
)
def test_a_wrong_gradient_is_noticed(mix, wrong):
    z = z_scores(estimates(STUDENT, TEACHER, mix, wrong), exact_gradient(STUDENT, TEACHER))
    assert not agrees(z) and z.abs().max() > 6 and z.square().mean() > 2


def test_minillm_itself_descends_the_sequence_level_reverse_kl():
    """Of two tokens, the first has one reward after it: length normalization divides by one."""
    rows = PROMPTS.repeat(ROWS, 1)
    minillm = MiniLLM(STUDENT, TEACHER, OnPolicyConfig(len(rows), 1, 2, 0.0, 1e9), seed=0)
    batches = [Batch(np.array([call]), torch.cat((rows, rows[:, :1]), 1)) for call in range(CALLS)]
    gradients = [torch.autograd.grad(2 * minillm(batch).surrogate, STUDENT.head_weight)[0] for batch in batches]
    samples, expected = torch.stack(gradients), exact_gradient(STUDENT, TEACHER, 2)
    reached = slice(0, V + V * V)  # prefixes of one and two tokens
    assert (samples[..., V + V * V :] == 0).all()
    assert agrees(z_scores(samples[..., reached], expected[..., reached]))


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    samples = estimates(STUDENT, STUDENT, 0.2, paper(0.2))
    assert samples.abs().max() < 1e-12  # every reward is zero, so that even single samples are
    responses = sample_responses(STUDENT, STUDENT, PROMPTS, LENGTH, 0.2, torch.Generator().manual_seed(0))
    assert score(STUDENT, STUDENT, responses).single_step.abs().max() < 1e-12


def test_clip_and_length_normalization_do_what_they_say():
    """A teacher-mixed token of each kind: which ones still pull, and how strongly."""
    log_q = torch.log(torch.tensor([[0.5, 0.02, 0.5, 0.4]], dtype=torch.float64)).requires_grad_()
    log_p = torch.log(torch.tensor([[0.01, 0.9, 0.5, 0.1]], dtype=torch.float64))
    scored = ScoredResponses(torch.zeros(1, 4, dtype=torch.float64), log_q, log_p)
    ratio = log_q.exp() / (0.2 * log_p.exp() + 0.8 * log_q.exp())
    rewards = (log_p - log_q)[0].tolist()
    returns = torch.tensor([[sum(rewards[1:]) / 3, sum(rewards[2:]) / 2, rewards[3], 0.0]], dtype=torch.float64)
    assert ratio[0, 0] > 1.2 and returns[0, 0] > 0 and ratio[0, 1] < 0.8 and returns[0, 1] < 0  # both are clipped
    (got,) = torch.autograd.grad(4 * minillm_surrogate(scored, 0.2, 0.2), log_q)
    expected = -(ratio * returns).detach()
    expected[0, :2] = 0
    torch.testing.assert_close(got, expected)
    (unclipped,) = torch.autograd.grad(4 * minillm_surrogate(scored, 0.2, math.inf), log_q)
    torch.testing.assert_close(unclipped, -(ratio * returns).detach())


def test_responses_follow_the_mixture():
    """The law of whole responses, so that one position's draw does not depend on another's coin."""
    mix, tokens = 0.3, listed()
    log_q, log_p = (
        torch.log_softmax(m.logits(m.hidden(tokens[:, :-1])), -1).gather(-1, tokens[:, 1:, None])[..., 0].detach()
        for m in (STUDENT, TEACHER)
    )
    expected = (mix * log_p.exp() + (1 - mix) * log_q.exp()).prod(1) / V
    counts = []
    for call in range(1500):
        generator = generator_of(call, np.arange(3))
        responses = sample_responses(STUDENT, TEACHER, PROMPTS.repeat(4, 1), LENGTH, mix, generator).tokens
        code = (responses * V ** torch.arange(LENGTH, -1, -1)).sum(1)
        counts.append(torch.bincount(code, minlength=len(tokens)) / len(code))
    frequencies = torch.stack(counts).double()
    z = (frequencies.mean(0) - expected) / (frequencies.std(0) / len(frequencies) ** 0.5)
    assert agrees(z)


def test_draw_never_gives_a_token_without_mass():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    uniforms = torch.tensor([0.0, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(4, -1), uniforms).tolist() == [1, 1, 3, 3]


@pytest.fixture(scope="module")
def teacher(parts) -> TransformersModel:
    from microlm.corpus.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("gpt2", parts)
    return TransformersModel(tiny_llama(tokenizer), tokenizer.n_vocab).eval()


@pytest.fixture(scope="module")
def student(teacher) -> StudentLM:
    shape = ModelShape(
        teacher.n_vocab, 50304, layers=2, hidden_size=32, heads=2, head_dim=16, intermediate_size=48, context=64,
        rope_theta=1e4,
    )  # fmt: skip
    model = StudentLM(shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from the initial zeros, so that attention counts
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


SETTINGS = OnPolicyConfig(prompts=3, prompt_tokens=6, response_tokens=5, teacher_mix=0.4, clip=0.2)


def batch_of(windows: list[int]) -> Batch:
    tokens = torch.randint(0, 50257, (4, 16), generator=torch.Generator().manual_seed(0))
    return Batch(np.array(windows), torch.cat((tokens, tokens[:, :1]), 1))


def gradients_of(student: StudentLM, minillm: MiniLLM, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(minillm(batch).surrogate, tuple(student.parameters()))


def test_gradients_reach_every_parameter_of_the_student_and_none_of_the_teacher(student, teacher):
    minillm = MiniLLM(student, teacher, SETTINGS, seed=7)
    loss = minillm(batch_of([5, 2, 9, 1]))
    loss.surrogate.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in student.parameters())
    assert not student.head_weight.grad[student.n_vocab :].any()
    assert all(p.grad is None for p in teacher.parameters())
    assert loss.reverse_kl > 0 and not loss.reverse_kl.requires_grad
    student.zero_grad(set_to_none=True)


def test_the_same_seed_and_windows_give_the_same_bits(student, teacher):
    first, again = (
        gradients_of(student, MiniLLM(student, teacher, SETTINGS, 7), batch_of([5, 2, 9, 1])) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    others = ((8, [5, 2, 9, 1]), (7, [5, 2, 9, 3]))
    for seed, windows in others:
        other = gradients_of(student, MiniLLM(student, teacher, SETTINGS, seed), batch_of(windows))
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_reading_on_from_kept_keys_and_values_equals_reading_all_again(name, request):
    model = request.getfixturevalue(name)
    tokens = torch.randint(0, model.n_vocab, (3, 20), generator=torch.Generator().manual_seed(3))
    reader = Reader(model)
    with torch.no_grad():
        for length in (7, 8, 9, 14):
            reader.read(tokens[:, :length])
        torch.testing.assert_close(reader.hidden(tokens), model.hidden(tokens), rtol=1e-4, atol=1e-4)


def test_models_without_kept_keys_and_values_are_sampled_the_same(student, teacher):
    class Forgot(Forgetful):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.n_vocab, self.context, self.head_weight = model.n_vocab, model.context, model.head_weight
            self.hidden, self.logits = model.hidden, model.logits

    prompts = batch_of([0]).tokens[:, :6]
    kept, forgot = (
        sample_responses(*models, prompts, 8, 0.4, generator_of(1, np.array([0])))
        for models in ((student, teacher), (Forgot(student), Forgot(teacher)))
    )
    assert torch.equal(kept.tokens, forgot.tokens)
    torch.testing.assert_close(kept.teacher_hidden, forgot.teacher_hidden, rtol=1e-4, atol=1e-4)


def test_responses_longer_than_a_models_context_are_refused_in_one_line(student, teacher):
    with pytest.raises(UserError, match=r"params.yaml: on_policy.response_tokens: .* = 66 .* context of 64") as error:
        MiniLLM(student, teacher, OnPolicyConfig(1, 6, 60, 0.2, 0.2), 0)
    assert "\n" not in str(error.value)
