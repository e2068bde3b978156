"""What a part is given: the device, the shapes, the data's folder, the file and the time that is left."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.gpu.book import Book
from microlm.config import Config
from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.research.plan.estimate import config_of_scale
from microlm.runtime.device import Runtime, set_up

Figures = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""Keys, each with what measures it: one that fails costs the others nothing."""

HEADLINE, REHEARSAL = "gpt2-124m", "smoke"


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    n_vocab: int
    micro_batch_rows: tuple[int, ...]  # the first is the one that other parts refer to
    batch_tokens: int
    steps: int  # measured, after two that compile
    matrix: int  # of the square product
    copied_bytes: int
    head_rows: tuple[int, ...]
    captured_windows: int
    capture_rows: int  # windows in one forward pass of the teacher
    scoring_tokens: int  # in one forward pass of the evaluator
    training_s: float  # of each training of part `run`


AT_124M = Sizes(50_304, (64, 32, 16), 524_288, 3, 8192, 2**32, (65_536, 16_384), 256, 32, 131_072, 25.0)
TINY = Sizes(320, (4, 2, 1), 256, 1, 128, 2**20, (64, 32), 4, 2, 2048, 0.3)


@dataclass(frozen=True)
class Setting:
    """Of one run; small enough to be sent to the process of each part."""

    file: Path
    root: Path  # the repository's top folder
    workspace: Path  # params.yaml and data/, made for this run
    rehearsal: bool
    ends_at: float  # time.time()

    @property
    def sizes(self) -> Sizes:
        return TINY if self.rehearsal else AT_124M

    @property
    def left_s(self) -> float:
        return self.ends_at - time.time()

    @cached_property
    def book(self) -> Book:
        return Book(self.file)

    @cached_property
    def config(self) -> Config:
        """Of the scale that is measured, from the repository's params.yaml; the working directory is its folder."""
        config = config_of_scale(REHEARSAL if self.rehearsal else HEADLINE)
        batch = replace(
            config.at.batch, batch_tokens=self.sizes.batch_tokens, micro_batch_rows=self.sizes.micro_batch_rows[0]
        )
        return replace(config, at=replace(config.at, batch=batch))

    @cached_property
    def runtime(self) -> Runtime:
        """As params.yaml says; not compiled where Triton finds no C compiler, which it needs."""
        config = self.config.at.runtime
        compiler = any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))))
        config = config if compiler else replace(config, compile="off")
        # a rehearsal is for a busy machine too, where threads that wait for each other cost minutes
        return set_up(replace(config, threads=1) if self.rehearsal else config)

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def peak_tflops(self) -> float:
        """Of bfloat16 products, as part `matrix` has measured it. UserError where it has not."""
        if "peak_tflops" not in self.book.content:
            raise UserError(
                f"{self.file}: holds no peak_tflops yet, of which this is a share; run --parts matrix first"
            )
        return self.book.content["peak_tflops"]

    def shape(self, n_vocab: int | None = None) -> ModelShape:
        """Of the student, with a vocabulary of no padding rows."""
        size = n_vocab or self.sizes.n_vocab
        return ModelShape(n_vocab=size, padded_vocab=size, **vars(self.config.at.model))


@dataclass(frozen=True)
class Part:
    """One of the parts of a run.

    Attributes:
        does: for the list.
        estimate_s: how long it takes on an H100, guessed until a card has said it.
        needs_data: the bundle, or data/ of the repository.
        run: what it measures, one after another.
    """

    name: str
    does: str
    estimate_s: float
    needs_data: bool
    run: Callable[[Setting], Figures]
