"""The figures of a run as one table, for the terminal or for a page."""

from typing import Any

from bench.gpu.book import MEASURED, Book

HEADER = ("part", "what", "figures")
UNITS = {"bytes": ("GiB", 2**-30, "{:.2f}"), "ms": ("ms", 1, "{:.2f}"), "_s": ("s", 1, "{:.1f}")}


def text(book: Book) -> str:
    """One line a figure, under the card's name."""
    rows = _rows(book)
    widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in (0, 1)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in (HEADER, *rows)]
    return "\n".join(["", _title(book), "", *lines])


def markdown(book: Book) -> str:
    """The same, for a page."""
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * len(HEADER), *_rows(book))]
    return "\n".join([_title(book), "", *lines])


def _title(book: Book) -> str:
    said = book.content
    memory = f", {said['memory_bytes'] / 2**30:.0f} GiB" if said.get("memory_bytes") else ""
    rehearsed = "; a rehearsal at a tiny shape, its figures mean nothing" if said.get("rehearsal") else ""
    return f"{said.get('card', '?')}{memory}, PyTorch {said.get('torch', '?')}{rehearsed}"


def _rows(book: Book) -> list[tuple[str, str, str]]:
    rows = []
    for name, part in book.content["parts"].items():
        rows += [(name, key, figures_line(figures)) for key, figures in part["figures"].items()]
        if part["status"] != MEASURED:
            why = part.get("error") or f"about {part.get('estimate_s', 0):.0f} s"
            rows.append((name, part["status"], why.replace("|", "/")))
    return rows


def figures_line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_shown(name, value)}" for name, value in figures.items())


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
