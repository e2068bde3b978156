"""The state of a training on disk: weights, moments, the step and the history, whole or not at all.

Batches are a pure function of the step and nothing draws random numbers, so that this is all there is to save.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sha256_file, write_json
from microlm.training.optimizer import Optimizers
from microlm.training.telemetry import History

STATE, WEIGHTS, MOMENTS, PROGRESS = "state", "model.safetensors", "optimizer.safetensors", "progress.json"


def save_checkpoint(directory: Path, model: nn.Module, optimizers: Optimizers, step: int, history: History) -> None:
    """Replace the checkpoint in `directory`; the old one stands until the new one is whole."""
    with atomic_directory(directory / STATE) as folder:
        save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
        save_file({name: t.contiguous() for name, t in optimizers.state_tensors().items()}, folder / MOMENTS)
        hashes = {name: sha256_file(folder / name) for name in (WEIGHTS, MOMENTS)}
        write_json(folder / PROGRESS, {"step": step, "history": history.as_json(), "sha256": hashes})


def restore_checkpoint(directory: Path, model: nn.Module, optimizers: Optimizers) -> tuple[int, History]:
    """The step to go on from and the history so far; (0, empty) where there is no checkpoint.

    Raises:
        UserError: the checkpoint is damaged.
    """
    folder = directory / STATE
    if not folder.exists():
        return 0, History()
    progress = read_json(folder / PROGRESS, "the stage that was interrupted")
    try:
        for name, wanted in progress["sha256"].items():
            if sha256_file(folder / name) != wanted:
                raise SafetensorError(f"the sha256 of {name} is not the recorded one")
        model.load_state_dict(load_file(folder / WEIGHTS))
        optimizers.load_state_tensors(load_file(folder / MOMENTS))
        return progress["step"], History.from_json(progress["history"])
    except (SafetensorError, FileNotFoundError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder}: this checkpoint is damaged ({error}); remove that folder to start the training over"
        ) from None
