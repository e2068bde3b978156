"""A table of texts for a terminal and for Markdown. Cells of the head may hold several lines."""

import textwrap
from collections.abc import Sequence

WIDTH = 96  # columns of a terminal

Grid = list[list[str]]


def blocks(grid: Grid, keys: int = 1) -> list[str]:
    """The table as lines: columns that would run past 96 go into another block, beside the first `keys` ones again.

    A block leaves out the rows that have nothing in it.
    """
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*grid, strict=True)]
    blocks: list[list[int]] = [[]]
    for place in range(keys, len(widths)):
        taken = sum(widths[k] + 2 for k in (*range(keys), *blocks[-1]))
        if blocks[-1] and taken + widths[place] > WIDTH:
            blocks.append([])
        blocks[-1].append(place)
    tables = []
    for places in blocks:
        rows = [row for row in grid if any(row[k] for k in places)]
        shown = [*range(keys), *places]
        tables.append(_aligned([[row[k] for k in shown] for row in rows], [widths[k] for k in shown]))
    return tables


def _aligned(grid: Grid, widths: Sequence[int]) -> str:
    """First column to the left, the others to the right, headings of several lines above a rule."""
    heads = [cell.split("\n") for cell in grid[0]]
    depth = max(map(len, heads))
    stacked = [list(line) for line in zip(*([""] * (depth - len(head)) + head for head in heads), strict=True)]
    lines = []
    for first, *others in (*stacked, ["-" * width for width in widths], *grid[1:]):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(grid: Sequence[Sequence[str]], rest: str = "---:") -> str:
    """`rest`: how the columns after the first are set, in Markdown's own marks."""
    head, *body = ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in grid]
    return "\n".join([head, "|---|" + f"{rest}|" * (len(grid[0]) - 1), *body])


def wrapped(text: str, bullet: str = "") -> str:
    """`text` in lines of at most 96 columns, those after the first below the words behind the bullet."""
    indent = " " * len(bullet)
    return textwrap.fill(text, WIDTH, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)
