"""Score one model on a list of benchmarks: each a task under a protocol with a number of shots.

Everything that can be refused is refused before the first forward pass. A finished benchmark is on disk before the next
one begins, so that an interrupted run goes on where it stopped.

Several processes deal a benchmark's questions among them; all get every answer, the first one writes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from microlm.errors import UserError
from microlm.evaluation.candidates import Candidate
from microlm.evaluation.results.answers import answers
from microlm.evaluation.results.metrics import task_metrics
from microlm.evaluation.results.store import Identity, Result, require_ours, result_path, standing, write_result
from microlm.evaluation.scoring.backends import missed
from microlm.evaluation.scoring.encoding import Encoding, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.benchmarks import Material
from microlm.evaluation.tasks.task import task_named
from microlm.runtime import distributed
from microlm.runtime.terminal import progress_bar

# protocols that encode context and endings each by itself, without a begin-of-text token; all others are lm-eval's way
APART = ("completion",)


def identity(candidate: Candidate, material: Material) -> Identity:
    """What the result of this candidate on this material will say of itself."""
    model = candidate.model
    dtype = getattr(model, "activation_dtype", next(model.parameters()).dtype)
    return Identity(
        model=candidate.name,
        model_digest=candidate.weights,
        tokenizer=candidate.tokenizer.fingerprint,
        **material.benchmark._asdict(),
        data_sha256=material.data_sha256,
        questions_sha256=material.digest,
        dtype=str(dtype).removeprefix("torch."),
    )


def evaluate(
    candidate: Candidate, gathered: Sequence[Material], out: Path, batch_tokens: int, pmi: bool = False
) -> Iterator[tuple[Result, bool]]:
    """Each benchmark's result as soon as it is on disk, and whether it was there before.

    Args:
        batch_tokens: tokens in one forward pass.
        pmi: score the endings once more without the question, for normaliser `pmi`. Tasks whose endings are the same in
            every question get it in any case: it costs a question more.
    """
    with progress_bar(sum(len(m.reads) for m in gathered), 0, "question", candidate.name) as bar:
        for material in gathered:
            bar.set_description(f"{candidate.name}: {material.benchmark}")
            who = identity(candidate, material)
            there = standing(out, who)
            complete = there is not None and ("unconditional_0" in there.table or not pmi)
            if distributed.any_rank(distributed.is_first() and complete):
                bar.update(len(material.reads))
                yield there, True
                continue
            result = Result(who, unavailable=material.unavailable)
            if not material.unavailable:
                result = score_benchmark(candidate, material, batch_tokens, pmi, bar.update)
            if distributed.is_first():
                write_result(out, result)
            yield result, False


def score_benchmark(
    candidate: Candidate,
    material: Material,
    batch_tokens: int,
    pmi: bool = False,
    progress: Callable[[int], object] = int,
) -> Result:
    """Score, answer, measure. UserError as `engine.score` and `encode`."""
    benchmark, encoding, used = material.benchmark, _encode(candidate, material), Counter()
    task = task_named(benchmark.task)
    nats = _score(candidate, encoding, batch_tokens, progress=progress, used=used)
    fixed_endings = len({question.endings for question in material.questions}) == 1
    bare = _without_question(candidate, material, batch_tokens) if pmi or fixed_endings else None
    misses = _score(candidate, encoding, batch_tokens, measure=missed) if task.kind == "word" else None
    lengths = [item.lengths for item in encoding.questions]
    nats, lengths = (_of_questions(material, of_reads) for of_reads in (nats, lengths))
    table = answers(material.questions, nats, lengths, bare, benchmark.protocol, misses)
    metrics = task_metrics(task, benchmark.protocol, benchmark.shots, table)
    metrics |= {"truncated": encoding.truncated, "unshared_prefix": encoding.unshared, "backends": dict(used)}
    return Result(identity(candidate, material), metrics, table, data=material.data)


def _of_questions(material: Material, of_reads: list[np.ndarray]) -> list[np.ndarray]:
    """What was found of `Material.reads`, joined to one array [endings] a question."""
    rest = iter(of_reads)
    return [np.concatenate([next(rest) for _ in question.read()]) for question in material.questions]


def _score(candidate: Candidate, encoding: Encoding, batch_tokens: int, **asked: Any) -> list[np.ndarray]:
    """`engine.score` of batches dealt to the processes; every process gets the nats of all."""
    model, name = candidate.model, candidate.name
    return score(model, encoding.questions, batch_tokens, encoding.prefix, name=name, together=True, **asked)


def _encode(candidate: Candidate, material: Material) -> Encoding:
    joint, limit, start = material.benchmark.protocol not in APART, candidate.model.context, candidate.start_token
    return encode(material.reads, candidate.tokenizer, limit, start, material.prefix, joint, candidate.begin)


def _without_question(candidate: Candidate, material: Material, batch_tokens: int) -> list[np.ndarray]:
    """The endings' nats after `Question.unconditional`, each distinct set of endings scored once."""
    distinct = {(q.unconditional, *q.endings): q for q in material.questions}
    bare = tuple(replace(q, context=q.unconditional, openings=()) for q in distinct.values())
    encoding = _encode(candidate, replace(material, questions=bare, prefix=""))
    nats = dict(zip(distinct, _score(candidate, encoding, batch_tokens), strict=True))
    return [nats[q.unconditional, *q.endings] for q in material.questions]


def refuse_before_scoring(candidate: Candidate, gathered: Sequence[Material], out: Path) -> None:
    """UserError where exemplars alone fill the model's context, or a result's place holds what is not ours."""
    for material in gathered:
        who, context = identity(candidate, material), candidate.model.context
        require_ours(result_path(out, who), who.model)
        if material.prefix:
            (ids,) = candidate.tokenizer.encode_batch([material.prefix])
            length = len(ids) + (0 if who.protocol in APART else len(candidate.begin))
            if length >= context:
                raise UserError(
                    f"shots: the {who.shots} exemplars of {who.task} take {length} tokens, {candidate.name} has "
                    f"{context} positions; ask for fewer"
                )
