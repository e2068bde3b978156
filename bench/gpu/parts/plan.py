"""What `microlm plan` foretells for this card, beside what was measured on it."""

from dataclasses import replace
from functools import partial
from typing import Any

from bench.gpu.parts.steps import CACHED, CROSS_ENTROPY, key_of
from bench.gpu.setting import Figures, Setting
from microlm.research.plan.estimate import Machine
from microlm.training.memory import Precision, training_memory

ROWS = {CROSS_ENTROPY: False, CACHED: True}


def run(setting: Setting) -> Figures:
    """Times and memory of steps, and of the teacher's pass."""
    for case, distills in ROWS.items():
        for rows in setting.sizes.micro_batch_rows:
            yield key_of(case, rows), partial(_step, setting, case, rows, distills)
    yield "capture of the OLMo-1B shape", lambda: _capture(setting)


def _step(setting: Setting, case: str, rows: int, distills: bool) -> dict[str, float]:
    """Utilisation that the plan assumes where no card is known, and bytes as it counts them."""
    measured = _measured(setting, "steps", key_of(case, rows))
    config = setting.config
    batch = replace(config.at.batch, micro_batch_rows=rows)
    top_k = config.at.teacher.top_k if distills else 0
    device, precision = setting.device.type, Precision.of(config.at.runtime)
    held = training_memory(
        batch, precision, setting.shape(), config.at.pretrain.optimizer, 1, top_k, device
    )["total"]  # fmt: skip
    return {
        **_rate(measured),
        "planned_bytes": held,
        "measured_bytes": measured["peak_bytes"],
        "bytes_measured_over_planned": measured["peak_bytes"] / held,
    }


def _capture(setting: Setting) -> dict[str, float]:
    return _rate(_measured(setting, "capture", "OLMo-1B shape"))


def _rate(measured: dict[str, Any]) -> dict[str, float]:
    planned = Machine().flops_per_s / measured["flops_per_token"]
    found = measured["tokens_per_s"]
    return {
        "planned_tokens_per_s": planned,
        "measured_tokens_per_s": found,
        "measured_over_planned": found / planned,
    }


def _measured(setting: Setting, part: str, key: str) -> dict[str, Any]:
    figures = setting.book.figures(part).get(key, {})
    if "tokens_per_s" not in figures:
        raise LookupError(f"part {part} has not measured {key}")
    return figures
