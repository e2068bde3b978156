"""What is said where a training does not fit into its device's memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from microlm import distributed
from microlm.errors import UserError
from microlm.model import StudentLM
from microlm.scale import BatchConfig


@contextmanager
def memory_explained(model: StudentLM, batch: BatchConfig, arm: str, optimizer: str, ids: int) -> Iterator[None]:
    """UserError in place of torch.OutOfMemoryError: what the plan has for this training, and the key to lower.

    Args:
        ids: cached ids of a token, where the training distills.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        planned = planned_bytes(model, batch, optimizer, ids) / 1e9
        why = ". ".join(str(error).split("\n")[0].split(". ")[:2]).rstrip(".")  # what was asked for; then come advices
        raise UserError(
            f"{arm}: the memory of {_name(model.head_weight.device)} is too small ({why}); the plan has {planned:.3g} "
            f"GB for this training, a live teacher apart; {_mend(batch)}"
        ) from None


def planned_bytes(model: StudentLM, batch: BatchConfig, optimizer: str, ids: int = 0) -> int:
    """What `microlm plan` has for this training as it is set up, on each device."""
    # here: it asks every part of the pipeline for its shapes, the training among them
    from microlm.plan.memory import Precision, training_memory

    precision = Precision(model.activation_dtype.itemsize, model.compiled)
    device = model.head_weight.device.type
    return training_memory(batch, precision, model.shape, optimizer, distributed.size(), ids, device)["total"]


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    of = torch.cuda.get_device_properties(device)
    return f"{of.name}, {of.total_memory / 1e9:.1f} GB,"


def _mend(batch: BatchConfig) -> str:
    rows = batch.micro_batch_rows
    if rows == 1:
        return "batch.micro_batch_rows is 1 already: lower batch.seq_len or the model's shape in params.yaml"
    fewer = max(part for part in range(1, rows) if batch.rows % part == 0)
    return (
        f"lower batch.micro_batch_rows={rows} in params.yaml, e.g. to {fewer}: a step stays {batch.batch_tokens} tokens"
    )
