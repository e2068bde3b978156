"""The GPUs of a plan, and what one reaches: the figures that `python -m bench.gpu` leaves in bench/gpu/<card>.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.errors import UserError

MEASURED = Path(__file__).parents[3] / "bench" / "gpu"
AGAIN = "delete it, or measure again: make gpu"


@dataclass(frozen=True)
class Rate:
    """Of one GPU: 10^12 operations a second at its best, the share that a run reaches, and who says so."""

    peak_tflops: float
    utilisation: float
    source: str


# dense bfloat16 of an H100 SXM, by its maker's data sheet; the share is what llm.c and nanochat report at 124M
ASSUMED = Rate(989.0, 0.4, "assumed, not measured")


@dataclass(frozen=True)
class Machine:
    """`gpus` of one kind."""

    gpus: int = 1
    rate: Rate = ASSUMED
    price_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """Of one GPU at work."""
        return self.rate.peak_tflops * 1e12 * self.rate.utilisation

    def work(self, tokens: int, flops: float, steps: int | None = None, busy: float = 1.0) -> dict[str, Any]:
        """A stage's work, its wall-clock hours and price. `busy`: share of the GPUs that have something to do."""
        hours = flops / (self.gpus * busy) / self.flops_per_s / 3600
        return {
            "tokens": tokens,
            "steps": steps,
            "flops": flops,
            "gpu_hours": hours * self.gpus,
            "hours": hours,
            "price": None if self.price_per_gpu_hour is None else self.price_per_gpu_hour * hours * self.gpus,
        }


def rate_of(card: str | None, folder: Path = MEASURED) -> Rate:
    """That of `card`; of the only card measured where None, and what is assumed where none or several were.

    UserError where `card` was not measured, or a file is damaged.
    """
    known = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            peak, share = content.get("peak_tflops"), content.get("utilisation")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None
        if peak is None or share is None:
            continue  # its steps were not timed
        numbers = all(isinstance(value, int | float) and value > 0 for value in (peak, share))
        if not numbers or share > 1:
            raise UserError(f"{path}: peak_tflops {peak!r} and utilisation {share!r} are no rate; {AGAIN}")
        known[path.stem] = Rate(float(peak), float(share), f"measured on this card: {path.parent.name}/{path.name}")
    if card is None:
        return next(iter(known.values())) if len(known) == 1 else ASSUMED
    if card not in known:
        raise UserError(f"--card: {card!r} was not measured; known: {', '.join(known) or 'none yet (make gpu)'}")
    return known[card]
