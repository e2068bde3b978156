"""The terminal: a banner before a long run, one progress bar during it, nothing that scrolls past.

Of several processes only the first one speaks.
"""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from microlm.errors import plain
from microlm.runtime import distributed


def banner(title: str, lines: Sequence[str]) -> None:
    if not distributed.is_first():
        return
    print(f"\n{plain(title)}")
    for line in lines:
        print(f"  {plain(line)}")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """65 -> '1 min 05 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress_bar(total: int, done: int, unit: str, description: str = "") -> tqdm:
    """One bar, redrawn in place; where the output is no terminal, a line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=plain(description),
        mininterval=interval,
        dynamic_ncols=True,
        unit_scale=unit == "tok",
        leave=True,
        disable=not distributed.is_first(),
    )
