"""Bytes that a teacher at work holds at its peak, on one device."""

from microlm.config import Config
from microlm.corpus.parts import PARTS, SMOLLM2
from microlm.research.plan.sizes import TeacherShape
from microlm.teacher.capture import GROUPS, HEAD_ROWS
from microlm.training.memory import FLOAT32, Precision


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
