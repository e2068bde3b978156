"""The curves while a training goes on, as TensorBoard's event files: `log: [csv, tensorboard]` in params.yaml.

They lie in runs/<model>/<digest of what the training depends on>/, so that runs of other parameters stand beside each
other and one that is run again takes its own place. What they hold is the history, which is in every checkpoint: a
resumed training writes all of it again into a new file, and TensorBoard forgets the old one's points (purge_step).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from microlm.errors import UserError
from microlm.runtime.resume import resume_root

if TYPE_CHECKING:
    from microlm.training.history import History

CSV, TENSORBOARD = "csv", "tensorboard"
RUNS = "runs"
EVENTS = "events.out.tfevents.*"


def refuse_absent(log: Sequence[str]) -> None:
    """UserError where params.yaml asks for TensorBoard's files and its package is not installed."""
    if TENSORBOARD in log and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "params.yaml: log: tensorboard needs a package that is not installed; pip install -c constraints.txt "
            "-e '.[tensorboard]', or set log: [csv]"
        )


@contextmanager
def live_curves(
    log: Sequence[str], name: str, resumed_as: str, first_step: int, said: Sequence[str]
) -> "Iterator[Callable[[History], None]]":
    """Yield what shows a history each time that it has grown; nothing where nobody asked, and in other processes than
    the first.

    Args:
        name: of the model; resumed_as: of the folder in which its training is resumed, which ends with the digest.
        first_step: of the training on the curves' axis.
        said: lines about the run, which TensorBoard shows as text.
    """
    from microlm.runtime import distributed
    from microlm.runtime.terminal import banner

    if TENSORBOARD not in log or not distributed.is_first():
        yield lambda history: None
        return
    # under `dvc exp run --temp` too in the repository that outlives its copy
    top = resume_root().parent / RUNS
    folder = top / name / resumed_as.removeprefix(f"{name}-")
    banner(f"{name}: curves in {folder}", [f"tensorboard --logdir {top}"])
    with event_files(folder, first_step, said) as show:
        yield show


@contextmanager
def event_files(folder: Path, first_step: int, said: Sequence[str]) -> "Iterator[Callable[[History], None]]":
    """Yield what writes the part of a history that has come since the last call, and flushes."""
    from torch.utils.tensorboard import SummaryWriter

    old = list(folder.glob(EVENTS))
    writer = SummaryWriter(folder, purge_step=first_step)
    for file in old:  # the new one has the whole history
        file.unlink(missing_ok=True)
    written = {"loss": 0, "hellaswag": 0, "log": 0}

    def show(history: "History") -> None:
        for curve in ("loss", "hellaswag"):
            for row in getattr(history, curve)[written[curve] :]:
                for column, value in row.items():
                    if column != "step" and value is not None:
                        writer.add_scalar(f"{curve}/{column}", value, row["step"])
        for line in history.log[written["log"] :]:
            step, label, value = line.split()
            if label == "train":  # of each step; what the other lines say stands in the curves
                writer.add_scalar("step/train_loss", float(value), int(step))
        written.update({key: len(getattr(history, key)) for key in written})
        writer.flush()

    writer.add_text("run", "\n".join(f"    {line}" for line in said), first_step)
    try:
        yield show
    finally:
        writer.close()
