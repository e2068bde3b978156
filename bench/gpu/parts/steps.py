"""Whole training steps of the project's own loop: tokens/s, peak memory, share of the card's matrix rate."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.gpu import materials
from bench.gpu.device import compilations, forget_peak, peak_bytes, synchronize
from bench.gpu.setting import Figures, Setting
from microlm.config import Config
from microlm.corpus.batches import Batches
from microlm.models.interface import LanguageModel
from microlm.models.student import StudentLM, parameter_count
from microlm.pipeline.asked_objective import objective_schedule
from microlm.research.plan.sizes import forward_flops
from microlm.teacher.recorders import LiveTeacher, Recorder
from microlm.training import losses
from microlm.training.loop import Feed, Loss, Plan, Replica, take_step
from microlm.training.optimizer import Optimizers

WARM_UP = 2
CROSS_ENTROPY, CACHED = "cross-entropy", "cached rkl, lumped"
LIVE = {"live SmolLM2-135M": materials.smollm2, "live OLMo-1B shape": materials.olmo_1b}


@dataclass(frozen=True)
class Case:
    """One kind of step, at all micro-batch sizes or at the first alone."""

    name: str
    objective: str = "rkl"
    tail: str = "lumped"
    everywhere: bool = True


CASES = (
    Case(CROSS_ENTROPY),
    Case(CACHED),
    Case("cached rkl, capped", tail="capped"),
    *(Case(name) for name in LIVE),
    Case("cached fkl, lumped", objective="fkl", everywhere=False),
)


def key_of(case: str, rows: int) -> str:
    return f"{case}, {rows} rows"


def run(setting: Setting) -> Figures:
    for case in CASES:
        teacher = LIVE[case.name](setting) if case.name in LIVE else None
        n_vocab = teacher.n_vocab if teacher else setting.sizes.n_vocab
        bench = StepBench(setting, setting.config, n_vocab, Path("steps"))
        for rows in setting.sizes.micro_batch_rows[: None if case.everywhere else 1]:
            yield key_of(case.name, rows), partial(bench.measure, case, rows, teacher)


class StepBench:
    """A student and its optimizers, for steps of any loss and micro-batch size."""

    def __init__(self, setting: Setting, config: Config, n_vocab: int, directory: Path) -> None:
        """Its random tokens and records go below `directory`."""
        self.setting, self.config, self.n_vocab, self.directory = setting, config, n_vocab, directory
        self.model = StudentLM(setting.shape(n_vocab)).set_activation_dtype(setting.runtime.dtype)
        self.model.to(setting.device)
        if setting.runtime.compiled:
            self.model.compile_blocks()
        self.optimizers = Optimizers(self.model, config.at.pretrain)

    def measure(self, case: Case, rows: int, teacher: LanguageModel | None = None) -> dict[str, float]:
        """A step of the configured length in micro-batches of `rows` windows."""
        setting, flops = self.setting, self.flops_per_token(teacher)
        step_s, recompilations = self.seconds_of_step(case, rows, teacher)
        rate = self.config.at.batch.batch_tokens / step_s
        found = {
            "tokens_per_s": rate,
            "step_ms": step_s * 1e3,
            "peak_bytes": peak_bytes(),
            "utilisation": rate * flops / 1e12 / setting.peak_tflops,
            "flops_per_token": flops,
            "compiled": setting.runtime.compiled,
            "recompilations": recompilations,
        }
        if case.name == CROSS_ENTROPY and rows == setting.sizes.micro_batch_rows[0]:
            setting.book.about({"utilisation": found["utilisation"]})
        base = setting.book.figures("steps").get(key_of(CROSS_ENTROPY, rows), {})
        return found | ({"over_cross_entropy": base["tokens_per_s"] / rate} if "tokens_per_s" in base else {})

    def seconds_of_step(self, case: Case, rows: int, teacher: LanguageModel | None = None) -> tuple[float, int]:
        """Median of a step, and graphs that were compiled after the steps that warm up."""
        batches = materials.batches_of(self.config, self.directory, self.n_vocab, rows)
        steps = self._steps(batches, self._loss(case, batches, teacher))
        forget_peak(self.setting.device)
        for _ in range(WARM_UP):
            next(steps)
        compiled = compilations()
        seconds = [next(steps) for _ in range(self.setting.sizes.steps)]
        return statistics.median(seconds), compilations() - compiled

    def flops_per_token(self, teacher: LanguageModel | None = None) -> float:
        """As `microlm plan` counts them; a live teacher's parameters all multiply (its embedding is its head)."""
        seq_len, shape = self.config.at.batch.seq_len, self.model.shape
        width = shape.heads * shape.head_dim
        found = 3 * forward_flops(parameter_count(shape), shape.layers, width, seq_len)
        if teacher is None:
            return found
        config = teacher.network.config
        own = sum(parameter.numel() for parameter in teacher.parameters())
        return found + forward_flops(own, config.num_hidden_layers, config.hidden_size, seq_len)

    def _loss(self, case: Case, batches: Batches, teacher: LanguageModel | None) -> Loss:
        config, n_vocab = self.config, self.n_vocab
        if case.name == CROSS_ENTROPY:
            return losses.cross_entropy(n_vocab, config.at.pretrain.z_loss)
        schedule = objective_schedule(_asked(config, case))
        identity = materials.identity_of(config, batches, n_vocab)
        if teacher is None:
            return losses.Distillation(n_vocab, schedule, materials.random_cache(self.directory / "cache", identity))
        record = Recorder(teacher, identity, self.setting.runtime.compiled)
        return losses.Distillation(n_vocab, schedule, LiveTeacher(record, materials.flat_tables(identity)))

    def _steps(self, batches: Batches, loss: Loss) -> Iterator[float]:
        """Seconds of one step after another."""
        setting, device = self.setting, self.setting.device
        plan = Plan("bench", WARM_UP + setting.sizes.steps, 0, self.config.at.pretrain)
        replica = Replica(self.model)
        feed = Feed(batches, loss, lambda step: step / plan.steps, device)
        for step in range(plan.steps):
            synchronize(device)
            began = time.perf_counter()
            take_step(replica, feed, plan, self.optimizers, step)
            synchronize(device)
            yield time.perf_counter() - began


def _asked(config: Config, case: Case) -> Config:
    return replace(config, objective=case.objective, tail=case.tail, alpha=0.5, alpha_schedule="constant")
