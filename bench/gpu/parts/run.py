"""A small run of the whole experiment with the stages' own code: control, continued and two students at the real shape.

The packaged text and teacher, the same wall-clock for every training as a cross-entropy step decides it, then all of
HellaSwag. `continued` and the students start from the control and differ in the loss alone.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.parts.steps import CASES, StepBench
from bench.gpu.setting import Figures, Setting
from bench.gpu.tiny import TEACHER
from microlm.config import Config
from microlm.corpus.batches import window_count
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import load_tokenizer
from microlm.evaluation.candidates import load_pipeline_model
from microlm.evaluation.run import evaluate
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.evaluation.tasks.benchmarks import benchmarks, gather
from microlm.files import read_json
from microlm.pipeline import training_stages
from microlm.pipeline.capture import capture_teacher
from microlm.pipeline.select import select_windows
from microlm.pipeline.start import make_start
from microlm.runtime.device import Runtime
from microlm.runtime.paths import METRICS, SHARDS

MICRO_BATCH = 1  # which of the sizes makes a step of its own here: few tokens ask for small steps
CURVE_WINDOWS, CURVE_ITEMS = 32, 40  # that the curves see at either end of a training
OVERHEAD_S, SHORTEST_S = 90.0, 5.0  # of labels, compilation, scores; four trainings share the rest of the minutes


def run(setting: Setting) -> Figures:
    experiment = Experiment(setting)
    yield "steps", experiment.decide
    yield "control", experiment.control
    yield "teacher", experiment.capture_teacher
    yield "continued", partial(experiment.train, "continued", training_stages.continue_control)
    for objective in ("rkl", "fkl"):
        yield (
            f"student, {objective}",
            partial(experiment.train, "student", training_stages.distill, objective=objective),
        )


class Experiment:
    """One after another in the working directory, which is the workspace."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.shards = TokenShards(SHARDS, "train")
        self.config = _configured(setting, self.shards)

    def decide(self) -> dict[str, float]:
        """How many steps a training gets, from a few that are timed."""
        setting, at = self.setting, self.config.at
        wanted_s = min(setting.sizes.training_s, max(SHORTEST_S, (setting.left_s - OVERHEAD_S) / 4))
        n_vocab = self.shards.manifest["tokenizer"]["n_vocab"]
        bench = StepBench(setting, self.config, n_vocab, Path("step-of-run"))
        step_s, _ = bench.seconds_of_step(CASES[0], at.batch.micro_batch_rows)
        steps = max(2, int(wanted_s / step_s))
        rows, windows = at.batch.rows, at.teacher.windows
        epochs = max(1, round(steps * rows / windows))
        steps = epochs * windows // rows
        pretrain = replace(at.pretrain, tokens=steps * at.batch.batch_tokens, evaluate_every=steps)
        continuation = replace(at.continuation, epochs=epochs, evaluate_every=steps)
        self.config = replace(self.config, at=replace(at, pretrain=pretrain, continuation=continuation))
        return {"step_ms": step_s * 1e3, "steps": steps, "epochs": epochs, "seconds_an_arm": steps * step_s}

    def capture_teacher(self) -> dict[str, Any]:
        """Stages `teacher` and `select`."""
        capture_teacher(self.config, self.setting.runtime)
        select_windows(self.config, self.setting.runtime)
        said = read_json(METRICS / "teacher.json", "teacher")
        return {"tokens_per_s": said["tokens_per_s"], "val_bpb": said["val"]["bpb"], "elapsed_s": said["elapsed_s"]}

    def control(self) -> dict[str, Any]:
        """Stages `start` and `pretrain`."""
        make_start(self.config, self.setting.runtime)
        return self.train("control", training_stages.pretrain)

    def train(self, name: str, train: Callable[[Config, Runtime], None], objective: str = "rkl") -> dict[str, Any]:
        """Train it, then score it."""
        config, runtime = replace(self.config, objective=objective), self.setting.runtime
        train(config, runtime)
        said = read_json(METRICS / f"{name}.json", name)
        trained = {key: said[key] for key in ("steps", "tokens", "tokens_per_s", "train_loss", "peak_memory_bytes")}
        return trained | self._scores(name, config)

    def _scores(self, name: str, config: Config) -> dict[str, Any]:
        """All of HellaSwag and of the validation text, as stage `evaluate` takes them."""
        runtime, batch_tokens = self.setting.runtime, self.setting.sizes.scoring_tokens
        candidate = load_pipeline_model(name, config.at.teacher, runtime.dtype)
        candidate.model.to(runtime.device)
        began = time.perf_counter()
        out = Path("scores") / f"{name}-{config.objective}"
        asked = gather(benchmarks(["hellaswag"], "completion", [0], None), None, hub=False)
        ((result, _),) = evaluate(candidate, asked, out, batch_tokens)
        hellaswag_s = time.perf_counter() - began
        seq_len, lengths = config.at.batch.seq_len, load_tokenizer(SHARDS / "tokenizer").byte_lengths
        val = TokenShards(SHARDS, "val")
        seen = loss_on(candidate.model, val, lengths, seq_len, None, max(1, batch_tokens // seq_len))
        figures = {key: result.metrics[key] for key in ("acc_norm", "acc_norm_se", "gold_bpb", "items")}
        return {"val_bpb": seen.bpb, **figures, "hellaswag_s": hellaswag_s}


def _configured(setting: Setting, shards: TokenShards) -> Config:
    """The measured scale over the workspace's text and teacher, every training on all of the text."""
    at, rows = setting.config.at, setting.sizes.micro_batch_rows[MICRO_BATCH]
    batch = replace(at.batch, batch_tokens=rows * at.batch.seq_len, micro_batch_rows=rows)
    seen = {"validation_windows": CURVE_WINDOWS, "hellaswag_items": CURVE_ITEMS}
    named = str(TEACHER) if setting.rehearsal else "packaged"
    windows = at.teacher.windows if setting.rehearsal else window_count(shards, at.batch.seq_len)
    teacher = replace(at.teacher, model=named, revision=None, source="cache", windows=windows)
    evaluation = replace(at.evaluation, outside=None)  # which its bundle does not hold
    pretrain = replace(at.pretrain, windows="all", **seen)
    continuation = replace(at.continuation, windows="cached", **seen)
    at = replace(at, batch=batch, teacher=teacher, pretrain=pretrain, continuation=continuation, evaluation=evaluation)
    return replace(setting.config, start="fresh", init="control", alpha=0.5, alpha_schedule="constant", at=at)
