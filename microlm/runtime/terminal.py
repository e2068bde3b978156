"""The terminal: a banner before a long run, one progress bar during it, nothing that scrolls past.

Of several processes only the first one speaks.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from microlm.errors import plain


def _speaks() -> bool:
    """Whether this process is the first one. What never imported distributed.py, and torch with it, is alone."""
    distributed = sys.modules.get("microlm.runtime.distributed")
    return distributed is None or distributed.is_first()


def banner(title: str, lines: Sequence[str]) -> None:
    if not _speaks():
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
        disable=not _speaks(),
    )


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Where nobody can say how long the body takes: what it does and since when, redrawn in place and gone afterwards.

    Nothing where the output is no terminal.
    """
    if not (sys.stderr.isatty() and _speaks()):
        yield
        return
    ended, line = threading.Event(), tqdm(desc=plain(what), bar_format="{desc} ... {elapsed}", leave=False)

    def tick() -> None:
        while not ended.wait(1):
            line.refresh()

    ticking = threading.Thread(target=tick, name="waiting", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        ended.set()
        ticking.join()
        line.close()
