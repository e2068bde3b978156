"""The state of a training on disk: weights, moments, the step and the history, whole or not at all.

Batches are a pure function of the step and nothing draws random numbers, so that this is all there is to save.
"""

import time
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from microlm.errors import UserError
from microlm.files import (
    atomic_directory,
    read_json,
    recover_directory,
    refuse_unsealed,
    sealed,
    sha256_file,
    write_json,
)
from microlm.runtime import distributed
from microlm.training.average import Average
from microlm.training.history import History
from microlm.training.optimizer import Optimizers

STATE, PROGRESS = "state", "progress.json"
WEIGHTS, MOMENTS, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
WORK_PER_SAVE = 20  # seconds of training that a second of saving has to protect: saving costs a twentieth at most


class Pace:
    """When the next checkpoint is due. The state of a small training costs little to save, and that of a large one as
    much as several of its steps: the first save, whose cost nobody knows yet, is due at once.
    """

    def __init__(self) -> None:
        self._last_s, self._since = 0.0, time.perf_counter()

    def is_due(self) -> bool:
        """The same in every process: what the first one's clock says."""
        due = time.perf_counter() - self._since >= WORK_PER_SAVE * self._last_s
        return distributed.any_rank(distributed.is_first() and due)

    def saved(self, seconds: float) -> None:
        """A save that took `seconds` is through."""
        self._last_s, self._since = seconds, time.perf_counter()


def save_checkpoint(
    directory: Path, model: nn.Module, optimizers: Optimizers, average: Average, step: int, history: History
) -> None:
    """Replace the checkpoint in `directory`; the old one stands until the new one is whole.

    Every process has to call it, for the moments that it holds; the first one writes, and all wait for it.
    """
    moments = optimizers.state_tensors()
    if distributed.is_first():
        with atomic_directory(directory / STATE) as folder:
            held = {WEIGHTS: model.state_dict(), MOMENTS: moments, AVERAGE: average.state_tensors()}
            for name, tensors in held.items():
                save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
            hashes = {name: sha256_file(folder / name) for name in held}
            write_json(folder / PROGRESS, sealed({"step": step, "history": asdict(history), "files": hashes}))
    distributed.wait_for_all()


def restore_checkpoint(
    directory: Path, model: nn.Module, optimizers: Optimizers, average: Average
) -> tuple[int, History]:
    """The step to go on from and the history so far; (0, empty) where there is no checkpoint.

    Every process reads it, whatever the number of processes that wrote it.

    Raises:
        UserError: the checkpoint is damaged.
    """
    folder = directory / STATE
    recover_directory(folder)
    if not folder.exists():
        return 0, History()
    progress = read_json(folder / PROGRESS, "the stage that was interrupted")
    refuse_unsealed(progress, folder / PROGRESS, "remove its folder to start the training over")
    try:
        for name, wanted in progress["files"].items():
            if sha256_file(folder / name) != wanted:
                raise SafetensorError(f"the sha256 of {name} is not the recorded one")
        model.load_state_dict(load_file(folder / WEIGHTS))
        optimizers.load_state_tensors(load_file(folder / MOMENTS))
        average.load_state_tensors(load_file(folder / AVERAGE))
        return progress["step"], History(**progress["history"])
    except (SafetensorError, FileNotFoundError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder}: this checkpoint is damaged ({error}); remove that folder to start the training over"
        ) from None
