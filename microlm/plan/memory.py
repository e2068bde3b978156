"""Bytes that training and capture hold at their peak, on one device.

Shapes: N tokens of a micro-batch, V padded vocabulary, D hidden size, W attention width, F intermediate size.
"""

from dataclasses import dataclass

from microlm.architecture import ModelShape
from microlm.config import Config
from microlm.corpus.parts import PARTS, SMOLLM2
from microlm.objective.vocabulary_blocks import layout_of
from microlm.plan.sizes import TeacherShape, block_matrix_count, parameter_count
from microlm.scale import BatchConfig, RuntimeConfig
from microlm.teacher.capture import GROUPS, HEAD_ROWS

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
    matrices = block_matrix_count(shape)
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
    casts = a * block_matrix_count(shape) if narrow else 0
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
) -> dict[str, int]:
    """Bytes by purpose and in total, per device; each holds the whole model. `top_k`: ids of a distillation."""
    tokens = batch.micro_batch_rows * batch.seq_len
    held = {
        "weights": FLOAT32 * parameter_count(shape),
        "gradients": FLOAT32 * parameter_count(shape),
        "optimizer": optimizer_bytes(shape, optimizer, gpus),
    }
    embedding = FLOAT32 * shape.padded_vocab * shape.hidden_size
    parts = -(-(batch.rows // batch.micro_batch_rows) // gpus)
    head = head_bytes(shape, tokens, precision, device) + ENTRY_BYTES * tokens * top_k
    # with several parts a step, the head's new gradient stands beside the sum of the earlier ones
    passing = {
        "activations": activation_bytes(shape, batch.micro_batch_rows, batch.seq_len, precision),
        "head": head + (embedding if parts > 1 else 0),
    }
    # at the backward pass's end: the embedding's gradients as head and as lookup, and their sum
    return {**held, **passing, "total": sum(held.values()) + max(sum(passing.values()), 2 * embedding)}


def teacher_memory(config: Config, teacher: TeacherShape, n_vocab: int, rows: int, device: str) -> dict[str, int]:
    """Bytes of the teacher at work on `rows` windows. Without its shape only the weights are known."""
    a = Precision.of(config.at.runtime).activation_bytes
    tokens, logit = rows * config.at.batch.seq_len, FLOAT32 if device == "cuda" else a
    padded = -(-n_vocab // GROUPS) * GROUPS
    found = {
        "weights": a * teacher.parameters,
        "activations": a * tokens * (4 * teacher.hidden_size + 3 * teacher.intermediate_size),
        "head": padded * (a * teacher.hidden_size + logit * HEAD_ROWS[device]),
    }
    return {**found, "total": sum(found.values())}


def loading_bytes(config: Config, teacher: TeacherShape) -> int:
    """Main memory while the packaged teacher is read: its file, float32 tensors, and their copy."""
    a = Precision.of(config.at.runtime).activation_bytes
    return PARTS[SMOLLM2].bytes + (FLOAT32 + a) * teacher.parameters if config.at.teacher.model == "packaged" else 0
