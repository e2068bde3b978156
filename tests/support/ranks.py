"""What tests run in several processes: python -m tests.support.ranks pipeline | toy."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from microlm.config import load_config
from microlm.corpus.batches import Batches, evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.evaluation.scoring.encoding import Encoded
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.prompts import Question
from microlm.files import write_json
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.objective.fused_head import HeadLoss
from microlm.parameters import BatchConfig, PretrainConfig
from microlm.pipeline import training_stages
from microlm.pipeline.capture import capture_teacher
from microlm.pipeline.select import select_windows
from microlm.pipeline.training_stages import Evaluator
from microlm.runtime import distributed
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage
from microlm.teacher import cache as cache_module
from microlm.training.history import Evaluation
from microlm.training.loop import Evaluator as TrainingEvaluator
from microlm.training.loop import Feed, Loss, Plan, Replica, accumulate_gradients, per_token, train
from microlm.training.losses import cross_entropy
from microlm.training.optimizer import Optimizers

N_VOCAB, STEPS, BLOCK_BYTES = 70, 6, 2**16
EVEN = BatchConfig(seq_len=16, batch_tokens=64, micro_batch_rows=2)  # two parts: their sum has one order
UNEVEN = BatchConfig(seq_len=16, batch_tokens=96, micro_batch_rows=2)  # three, of which one of two processes takes two
SETTINGS = PretrainConfig(
    optimizer="muon", muon_learning_rate=0.02, learning_rate=0.003, weight_decay=0.1, schedule="warmup_stable_decay",
    warmup_fraction=0.1, decay_fraction=0.5, final_fraction=0.0, clip_norm=0.1, z_loss=1e-4, evaluate_every=2,
    average="none", average_decay=0.6, validation_windows=4, hellaswag_items=4, tokens=768, windows="all")  # fmt: skip
LOSS = cross_entropy(N_VOCAB, SETTINGS.z_loss)


def pipeline() -> None:
    """Every stage that several processes share, one after the other; `select`, which they do not, in the first."""
    from stages import evaluate  # which reads more modules than all the rest

    cache_module.SMALLEST_BLOCK = BLOCK_BYTES  # so that there are several blocks to deal
    config = load_config()
    runtime = set_up(config.at.runtime)
    training_stages.pretrain(config, runtime)
    capture_teacher(config, runtime)
    if distributed.is_first():
        select_windows(config, runtime)
    distributed.wait_for_all()
    training_stages.continue_control(config, runtime)
    training_stages.distill(replace(config, objective="minillm"), runtime)
    if distributed.is_first():
        Path("metrics/student.log").rename("metrics/minillm.log")
    training_stages.distill(config, runtime)
    for model in ("student", "teacher"):
        sys.argv = ["stages.evaluate", model]
        evaluate.main()


def toy_student() -> StudentLM:
    shape = ModelShape(
        N_VOCAB, 128, layers=2, hidden_size=16, heads=2, head_dim=8, intermediate_size=24, context=16, rope_theta=1e4
    )
    return StudentLM(shape, seed=3)


def toy_batches(batch: BatchConfig) -> Batches:
    return Batches(TokenShards(Path("shards"), "train"), batch, seed=1, windows=evenly_spaced(50, 40))


def look(model: StudentLM, _: np.ndarray | None) -> Evaluation:
    """A stand-in for the real evaluator that depends on the weights."""
    seen = float(model.head_weight.detach().double().square().mean()) + 1
    return Evaluation(seen, seen, seen, {"acc_norm": 0.25, "acc": 0.25, "gold_bpb": seen})


def toy_evaluator() -> Evaluator:
    """The real one, of several batches of windows and of questions: what is dealt is uneven."""
    drawn, shards = np.random.default_rng(4), TokenShards(Path("shards"), "train")

    def ids(longest: int) -> np.ndarray:
        return drawn.integers(0, N_VOCAB, drawn.integers(1, longest + 1))

    questions = []
    for number in range(250):
        asked = Question("hellaswag", str(number), "", number % 4, "", ("a",) * 4, (1,) * 4, "", ())
        questions.append(Encoded(asked, ids(10), tuple(ids(6) for _ in range(4))))
    return Evaluator(shards, shards, np.ones(N_VOCAB, np.int64), questions, EVEN, validation_windows=7, outside=shards)


def toy_training(
    name: str, loss: Loss, optimizer: str = "muon", evaluator: TrainingEvaluator = look
) -> SimpleNamespace:
    """A short training in folder `name`; what became of it."""
    settings, model = replace(SETTINGS, optimizer=optimizer), toy_student()
    plan = Plan("toy", STEPS, 0, settings)
    optimizers, ended, log, curves = Optimizers(model, settings), "", [], []
    try:
        history = train(model, toy_batches(EVEN), loss, plan, optimizers, evaluator, Path(name))
        log, curves = history.log, [history.loss, history.hellaswag]
    except UserError as error:
        ended = str(error)
    sums = [float(p.detach().double().square().sum()) for p in model.parameters()]
    state = sorted(optimizers.state_tensors()) if not ended else []
    return SimpleNamespace(ended=ended, log=log, curves=curves, weights=sums, state=state)


def at_call(number: int, act: Callable[[HeadLoss], HeadLoss], who: int) -> Loss:
    """The loss, with `act` on what it gives at the `number`-th call, in process `who` alone."""
    calls = []

    def loss(*arguments: object) -> HeadLoss:
        calls.append(1)
        found = LOSS(*arguments)
        return act(found) if len(calls) == number and distributed.rank() == who else found

    return loss


def stopped(found: HeadLoss) -> HeadLoss:
    os.kill(os.getpid(), signal.SIGTERM)
    return found


def broken(found: HeadLoss) -> HeadLoss:
    return found._replace(loss=found.loss * float("nan"))


def toy() -> None:
    """Small promises, each told in toy-<process>.json: gradients, both optimizers, who stops, who refuses."""
    torch.set_num_threads(1)
    replica, last = Replica(toy_student()), distributed.size() - 1
    feed = Feed(toy_batches(UNEVEN), LOSS, lambda step: 0.0, torch.device("cpu"))
    for step in range(2):  # the second pass is that of the buckets as the first one has ordered them
        replica.model.zero_grad(set_to_none=True)
        mean = per_token(accumulate_gradients(replica, feed, step).item(), feed)
    gradients = {name: p.grad.flatten()[:50].tolist() for name, p in replica.model.named_parameters()}
    runs = {
        "muon": toy_training("muon", LOSS, evaluator=toy_evaluator()),
        "adamw": toy_training("adamw", LOSS, "adamw"),
    }
    if last:  # the last process has one part of each step: its fifth call is in the third step after two rehearsals
        runs["stopped"] = toy_training("stopped", at_call(5, stopped, last))
        runs["broken"] = toy_training("broken", at_call(5, broken, last))
    counts: list[int] = []
    score(toy_student(), toy_evaluator().encoded, 1024, progress=counts.append, backend="tree", together=True)
    told = {"counts": counts, "loss": mean, "gradients": gradients, **{name: vars(run) for name, run in runs.items()}}
    write_json(f"toy-{distributed.rank()}.json", told)


if __name__ == "__main__":
    run_shared_stage({"pipeline": pipeline, "toy": toy}[sys.argv[1]])
