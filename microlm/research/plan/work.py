"""Floating-point operations of every stage, and the hours that they take at a given utilisation.

A multiplication and an addition are two operations. A forward pass takes 2 N a token for the N parameters that it
multiplies (Kaplan et al. 2020, arXiv:2001.08361, section 2.1) and 4 L W T for attention over T positions in L layers of
width W (Hoffmann et al. 2022, arXiv:2203.15556, appendix F: scores and weighted sum, the causal half not discounted);
a backward pass takes twice that. What our head computes twice to save memory is not counted: utilisation is of the
model's operations.
"""

import math
from dataclasses import dataclass

from microlm.config import Config
from microlm.errors import UserError
from microlm.evaluation.benchmarks import configured_benchmarks
from microlm.models.architecture import ModelShape
from microlm.models.student import parameter_count
from microlm.parameters import OptimizationConfig
from microlm.research.plan.sizes import CorpusSize, TeacherShape, outside_tokens
from microlm.teacher.capture import TABLE_WINDOWS

HELLASWAG_TOKENS = 174  # that a question costs, its context read once: mean over every tenth question, OLMo's tokens
HELLASWAG_QUESTIONS = 10_042


@dataclass(frozen=True)
class Work:
    """Of one stage."""

    tokens: int
    steps: int | None
    flops: float
    busy: float = 1.0  # share of the GPUs that have something to do

    def hours(self, gpus: int, flops_per_s: float) -> float:
        """Wall-clock hours on `gpus` that each do `flops_per_s` while they are busy."""
        return self.flops / (gpus * self.busy) / flops_per_s / 3600


def forward_flops(multiplied: int, layers: int, width: int, positions: int) -> int:
    """Of one token in a context of `positions`."""
    return 2 * multiplied + 4 * layers * width * positions


@dataclass(frozen=True)
class Budget:
    """The windows, and what a token costs in either model."""

    config: Config
    train_windows: int
    val_windows: int
    outside_windows: int
    student_forward: int
    teacher_forward: int

    @classmethod
    def build(cls, config: Config, corpus: CorpusSize, student: ModelShape, teacher: TeacherShape) -> "Budget":
        seq_len = config.at.batch.seq_len
        windows = [(tokens - 1) // seq_len for tokens in (corpus.train_tokens, corpus.val_tokens)]
        if min(windows) < 1:
            raise UserError(
                f"params.yaml: scales.{config.scale}.corpus: about {corpus.train_tokens} training and "
                f"{corpus.val_tokens} validation tokens do not fill a window of batch.seq_len={seq_len} each"
            )
        multiplied = parameter_count(student)
        if not student.tied:  # an embedding that is no head is looked up
            multiplied -= student.padded_vocab * student.hidden_size
        return cls(
            config,
            *windows,
            max(0, outside_tokens(config.at) - 1) // seq_len,
            forward_flops(multiplied, student.layers, student.query_width, seq_len),
            forward_flops(teacher.multiplied, teacher.layers, teacher.attention_width, seq_len),
        )

    @property
    def labelled(self) -> int:
        """Windows that the teacher sees."""
        return min(self.config.at.teacher.windows, self.train_windows)

    def held_out(self, windows: int | None) -> int:
        """Tokens of so many windows (None: all) of each text that is held out."""
        texts = (self.val_windows, self.outside_windows)
        return sum(min(windows or there, there) for there in texts) * self.config.at.batch.seq_len

    @property
    def continuation_steps(self) -> int:
        return self.config.at.continuation.epochs * self.labelled // self.config.at.batch.rows


def stages(budget: Budget, gpus: int) -> dict[str, Work]:
    """Work of each stage that computes."""
    config = budget.config
    at = config.at
    rates = at.pretrain if config.init == "scratch" else at.continuation
    live = budget.teacher_forward if config.distills and at.teacher.source == "live" else 0
    found = {
        "pretrain": _training(budget, at.pretrain.tokens // at.batch.batch_tokens, at.pretrain, gpus),
        "teacher": _capture(budget),
        "continue": _training(budget, budget.continuation_steps, rates, gpus),
        "distill": _training(budget, budget.continuation_steps, rates, gpus, live),
        "evaluate": _evaluate(budget),
    }
    if at.continuation.windows == "difference":
        tokens = budget.labelled * at.batch.seq_len
        found["select"] = Work(tokens, None, tokens * budget.student_forward)
    return found


def busy_share(config: Config, gpus: int) -> float:
    """Share of `gpus` that work in a training: a step's micro-batches are dealt out whole."""
    parts = config.at.batch.rows // config.at.batch.micro_batch_rows
    return parts / (gpus * math.ceil(parts / gpus))


def _training(budget: Budget, steps: int, rates: OptimizationConfig, gpus: int, live: int = 0) -> Work:
    """`live`: operations that the teacher spends on a token of a step."""
    batch = budget.config.at.batch
    tokens = steps * batch.batch_tokens
    points = math.ceil(steps / rates.evaluate_every) + 1
    seen = budget.held_out(rates.validation_windows) + rates.hellaswag_items * HELLASWAG_TOKENS
    evaluation = points * seen * budget.student_forward
    busy = busy_share(budget.config, gpus)
    return Work(tokens, steps, tokens * (3 * budget.student_forward + live) + evaluation, busy)


def _capture(budget: Budget) -> Work:
    at = budget.config.at
    cached = budget.labelled if at.teacher.source == "cache" else 0
    seen = cached + min(TABLE_WINDOWS, budget.labelled) + min(at.pretrain.validation_windows, budget.val_windows)
    tokens = cached * at.batch.seq_len
    return Work(tokens, None, seen * at.batch.seq_len * budget.teacher_forward)


def _evaluate(budget: Budget) -> Work:
    """Held-out text and HellaSwag, three students and the teacher."""
    tokens = budget.held_out(budget.config.at.evaluation.windows)
    for benchmark in configured_benchmarks(budget.config.at.evaluation.benchmarks):
        if benchmark.task.name == "hellaswag":
            tokens += min(benchmark.limit or HELLASWAG_QUESTIONS, HELLASWAG_QUESTIONS) * HELLASWAG_TOKENS
    return Work(4 * tokens, None, tokens * (3 * budget.student_forward + budget.teacher_forward))


def uncounted_tasks(config: Config) -> list[str]:
    """Tasks of stage `evaluate` that `_evaluate` leaves out: how long their questions are is known with their data."""
    names = [benchmark.task.name for benchmark in configured_benchmarks(config.at.evaluation.benchmarks)]
    return sorted({name for name in names if name != "hellaswag"})
