"""The probe for people: gradient error against bytes a token as a figure, and metrics/probe.json as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from microlm.files import atomic_file
from microlm.report import text_table
from microlm.report.figure_style import FAINT, INK

SHOWN = ("32", "64", "128")  # bytes a token, of the table
# ours in saturated colours and whole lines, peers in greys and broken ones, told apart by their markers
STYLES = {
    "lumped": ("#8fb4dc", "o"),
    "capped": ("#2f6db3", "o"),
    "compact lumped": ("#8fb4dc", "D"),
    "compact capped": ("#123f78", "D"),
    "head + samples": ("#b98bc9", "v"),
    "head + samples, half lumped": ("#7c3f94", "v"),
    "table tail": ("#eda27c", "o"),
    "compact table tail": ("#d1571e", "D"),
    "code tail": ("#1b7f5c", "^"),
    "renormalized": ("#55555e", "x"),
    "dropped": ("#8a8a92", "+"),
    "floored": ("#8a8a92", "1"),
    "ghost token": ("#55555e", "2"),
    "random sampling": ("#b09a55", "x"),
    "threshold sampling": ("#b09a55", "+"),
}
ROWS = {
    "relative_error": "relative error of a position's gradient",
    "step_error": "relative error of a step's summed gradient",
}
COLUMNS = {"forward": "forward KL", "reverse": "reverse KL"}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write the figure of `Probe.table` as PNG: one line a method, a column for each direction of KL, the same bytes
    for the same numbers.
    """
    figure = Figure(figsize=(11, 8.2), layout="constrained", facecolor="white")
    grid = figure.subplots(len(ROWS), len(COLUMNS), sharex=True)
    origins = dict(zip(table["method"], table["origin"]))
    for axes_row, (criterion, error) in zip(grid, ROWS.items()):
        axes_row[0].set_ylabel(error, color=INK)
        for axes, direction in zip(axes_row, COLUMNS):
            _panel(axes, table[table["direction"] == direction], criterion)
    for top, bottom, name in zip(*grid, COLUMNS.values()):
        top.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK)
        bottom.set_xlabel("bytes a token", color=INK)
    handles = [Line2D([], [], **_style(name, origin), label=f"{name} ({origin})") for name, origin in origins.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=INK)
    with atomic_file(path) as file:
        # the library's version would change the bytes, and DVC would see another output
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _panel(axes: Axes, rows: pd.DataFrame, criterion: str) -> None:
    for name, line in rows.groupby(["method", "origin"], sort=False):
        line = line.sort_values("bytes")
        axes.plot(line["bytes"], line[criterion], **_style(*name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e4e4e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3, labelleft=True)


def _style(method: str, origin: str) -> dict[str, object]:
    color, marker = STYLES[method]
    if origin == "ours":
        return {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.7, "zorder": 3}
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.1, "linestyle": (0, (4, 2))}


def markdown(metrics: Mapping[str, Any]) -> str:
    """Per direction a row for each method: error of a position's gradient and of a step's, at each budget."""
    budgets, blocks = metrics["bytes_per_token"], []
    for direction in COLUMNS:
        at_budgets = [budgets[budget][direction] for budget in SHOWN]
        names = dict.fromkeys((*at_budgets[-1]["methods"], *at_budgets[0]["methods"]))
        rows = [[f"{direction} KL", *(f"{budget} B" for budget in SHOWN)]]
        rows += [[name, *(_cell(found, name) for found in at_budgets)] for name in names]
        blocks.append(text_table.markdown(rows, "---"))
    nats = metrics["exact_nats"]
    note = (
        f"{metrics['positions']:,} validation positions; forward KL {nats['forward']:.2f} nats, reverse "
        f"{nats['reverse']:.2f}. A cell: mean relative error of a position's gradient / relative error of the LM "
        f"head's gradient summed over {metrics['step_positions']:,} positions. Bold: the least in its column, of each."
    )
    return "\n\n".join([note, *blocks]) + "\n"


def _cell(at_budget: Mapping[str, Any], name: str) -> str:
    found = at_budget["methods"].get(name)
    if found is None:
        return "not measured"
    marks = {key: "**" * (at_budget["best"][key] == name) for key in ROWS}
    return " / ".join(f"{mark}{found[key]:.3f}{mark}" for key, mark in marks.items())
