"""Bytes that a training holds at its peak on one device, and what is said where they do not fit.

Shapes: N tokens of a micro-batch, V padded vocabulary, D hidden size, W attention width, F intermediate size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM, parameter_count
from microlm.objective.vocabulary_blocks import layout_of
from microlm.parameters import BatchConfig, OptimizationConfig, RuntimeConfig
from microlm.runtime import distributed

FLOAT32 = 4
ENTRY_BYTES = 60  # of one cached id of one token while its loss is computed: ids, places, logits, slopes
# Resident set of a training's process on the CPU less what is counted here: Python, torch, the compiler and its
# kernels, questions, maps. Measured as docs/scale.md says
LIBRARIES_BYTES = {True: 640_000_000, False: 790_000_000}  # by whether blocks are compiled


@dataclass(frozen=True)
class Precision:
    """`auto` is taken for what a GPU gets: bfloat16 activations, compiled blocks."""

    activation_bytes: int
    compiled: bool

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> "Precision":
        return cls(FLOAT32 if runtime.dtype == "float32" else 2, runtime.compile == "auto")


def optimizer_bytes(shape: ModelShape, optimizer: str, gpus: int = 1) -> int:
    """Under Muon one moment of each matrix, dealt over the GPUs; two of every other parameter. All are float32."""
    matrices = shape.block_matrix_count
    if optimizer != "muon":
        return 2 * FLOAT32 * parameter_count(shape)
    return FLOAT32 * (2 * (parameter_count(shape) - matrices) + -(-matrices // gpus))


def activation_bytes(shape: ModelShape, rows: int, seq_len: int, precision: Precision) -> int:
    """What the trunk keeps for its backward pass, over and above the weights.

    A layer keeps its input, the normed input, the attention's output and the normed sum (D each); queries and keys
    before and after norm and rotation, values and mixed values (W each); gate, up and their product (F each). Eager
    blocks keep what compiled ones compute again, in float32 where norms compute in it. Weights cast to a narrower type
    are kept too.
    """
    a, wide = precision.activation_bytes, shape.heads * shape.head_dim
    narrow = a < FLOAT32
    if precision.compiled:
        d, w, f = 4 * a, 6 * a, 3 * a
    elif narrow:
        d, w, f = 2 * a + 4 * FLOAT32, 4 * a + 4 * FLOAT32, 4 * a
    else:
        d, w, f = 6 * a, 8 * a, 4 * a
    token = d * shape.hidden_size + w * wide + f * shape.intermediate_size + FLOAT32 * (2 + 3 * shape.heads)
    casts = a * shape.block_matrix_count if narrow else 0
    last = 2 * FLOAT32 * shape.hidden_size + FLOAT32  # the final norm
    tokens = rows * seq_len
    return tokens * (shape.layers * token + last + 8) + casts


def head_bytes(shape: ModelShape, tokens: int, precision: Precision, device: str) -> int:
    """Of objective/fused_head.py: the cast weight, the logits that are held, gradients of the hidden states."""
    a = precision.activation_bytes
    cast = a * shape.n_vocab * shape.hidden_size if a < FLOAT32 else 0
    logits = layout_of(tokens, shape.n_vocab, device).elements(tokens, shape.n_vocab)
    return cast + a * logits + tokens * shape.hidden_size * (FLOAT32 + 2 * a)


def training_memory(
    batch: BatchConfig,
    precision: Precision,
    shape: ModelShape,
    optimizer: str,
    gpus: int,
    top_k: int = 0,
    device: str = "cuda",
    average: str = "none",
) -> dict[str, int]:
    """Bytes by purpose and in total, per device; each holds the whole model. `top_k`: ids of a distillation."""
    tokens = batch.micro_batch_rows * batch.seq_len
    held = {
        "weights": FLOAT32 * parameter_count(shape),
        "gradients": FLOAT32 * parameter_count(shape),
        "optimizer": optimizer_bytes(shape, optimizer, gpus),
        "average": FLOAT32 * parameter_count(shape) * (average != "none"),
    }
    embedding = FLOAT32 * shape.padded_vocab * shape.hidden_size
    parts = -(-batch.micro_batches // gpus)
    head = head_bytes(shape, tokens, precision, device) + ENTRY_BYTES * tokens * top_k
    # with several parts a step, the head's new gradient stands beside the sum of the earlier ones
    passing = {
        "activations": activation_bytes(shape, batch.micro_batch_rows, batch.seq_len, precision),
        "head": head + (embedding if parts > 1 else 0),
    }
    # at the backward pass's end: the embedding's gradients as head and as lookup, and their sum
    return {**held, **passing, "total": sum(held.values()) + max(sum(passing.values()), 2 * embedding)}


@contextmanager
def memory_explained(
    model: StudentLM, batch: BatchConfig, name: str, rates: OptimizationConfig, ids: int
) -> Iterator[None]:
    """UserError in place of torch.OutOfMemoryError: what the plan has for this training, and the key to lower.

    Args:
        ids: cached ids of a token, where the training distills.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        device, precision = model.head_weight.device, Precision(model.activation_dtype.itemsize, model.compiled)
        shape, size = model.shape, distributed.size()
        held = training_memory(batch, precision, shape, rates.optimizer, size, ids, device.type, rates.average)
        planned = held["total"] / 1e9
        where = str(device)
        if device.type == "cuda":
            of = torch.cuda.get_device_properties(device)
            where = f"{of.name}, {of.total_memory / 1e9:.1f} GB,"
        why = ". ".join(str(error).split("\n")[0].split(". ")[:2]).rstrip(".")  # what was asked for; then come advices
        raise UserError(
            f"{name}: the memory of {where} is too small ({why}); the plan has {planned:.3g} "
            f"GB for this training, a live teacher apart; {_mend(batch)}"
        ) from None


def _mend(batch: BatchConfig) -> str:
    rows = batch.micro_batch_rows
    if rows == 1:
        return "batch.micro_batch_rows is 1 already: lower batch.seq_len or the model's shape in params.yaml"
    fewer = max(part for part in range(1, rows) if batch.rows % part == 0)
    return (
        f"lower batch.micro_batch_rows={rows} in params.yaml, e.g. to {fewer}: a step stays {batch.batch_tokens} tokens"
    )
