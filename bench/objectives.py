"""A training step under every objective and treatment of the tail, on the control and the cache of a finished run.

Real weights, real records: how many tokens a cap binds depends on both. All variants run in one process, so that they
share compiled code and memory; the ratio to cross-entropy's step is the median of those within a round. `live` is the
configured objective with the teacher run in every step. Run it after `make repro`.

    python -m bench.objectives [--rounds 5] [--only rkl-lumped rkl-capped ...]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from microlm.config import Config, load_config
from microlm.corpus.batches import Batches, cached_windows
from microlm.corpus.shards import TokenShards
from microlm.models.model_files import load_student
from microlm.models.student import StudentLM
from microlm.models.teacher_source import teacher_source
from microlm.pipeline.asked_objective import objective_schedule
from microlm.runtime.device import Runtime, set_up
from microlm.teacher.cache import TeacherCache, cache_identity
from microlm.teacher.recorders import LiveTeacher, Recorder, load_fitting_teacher
from microlm.training import losses
from microlm.training.loop import Feed, Loss, Replica, accumulate_gradients
from microlm.training.optimizer import Optimizers

SHARDS, CACHE, CONTROL = Path("data/shards"), Path("data/teacher"), Path("models/control")
OBJECTIVES = ("fkl", "rkl", "jsd", "skew_fkl", "skew_rkl", "tvd", "notebook")
TAILS = ("lumped", "capped", "table")
BASE, LIVE = "cross-entropy", "live"


def variants(config: Config, runtime: Runtime, model: StudentLM, only: list[str]) -> dict[str, Loss]:
    """Name -> loss."""
    shards = TokenShards(SHARDS, "train")
    identity = cache_identity(config.at.teacher, config.at.batch.seq_len, shards)
    windows = cached_windows(shards, identity.seq_len, config.at.teacher.windows)
    cache = TeacherCache(CACHE, identity, windows)
    found = {BASE: losses.cross_entropy(model.n_vocab, 0.0)}
    for objective in OBJECTIVES:
        for tail in TAILS:
            asked = objective_schedule(replace(config, objective=objective, tail=tail))
            found[f"{objective}-{tail}"] = losses.Distillation(model.n_vocab, asked, cache)
    if not only or LIVE in only:
        live = load_fitting_teacher(teacher_source(config.at.teacher), identity, runtime)
        teacher = LiveTeacher(Recorder(live, identity, runtime.compiled), cache.tables)
        found[LIVE] = losses.Distillation(model.n_vocab, objective_schedule(config), teacher)
    return {name: loss for name, loss in found.items() if not only or name in (BASE, *only)}


def step_of(model: StudentLM, batches: Batches, loss: Loss, optimizers: Optimizers) -> Callable[[int], None]:
    replica, feed = Replica(model), Feed(batches, loss, lambda _: 0.5, model.head_weight.device)

    def step(index: int) -> None:
        accumulate_gradients(replica, feed, index).item()  # as a step waits for its loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(0.0)  # the arithmetic of an update that leaves the weights as they are

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    config = load_config()
    runtime = set_up(config.at.runtime)
    model = load_student(CONTROL, runtime.dtype).to(runtime.device).train()
    if runtime.compiled:
        model.compile_blocks()
    shards = TokenShards(SHARDS, "train")
    windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    batches = Batches(shards, config.at.batch, config.seed, windows)
    optimizers = Optimizers(model, config.at.continuation)
    steps = {
        n: step_of(model, batches, x, optimizers) for n, x in variants(config, runtime, model, arguments.only).items()
    }
    for step in steps.values():  # compilation and first touches of memory
        step(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(arguments.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step(index)
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, seconds[BASE], strict=True))
        print(f"{name:<18} {statistics.median(taken) * 1e3:7.0f} ms   {ratio:.3f} of {BASE}", flush=True)


if __name__ == "__main__":
    main()
