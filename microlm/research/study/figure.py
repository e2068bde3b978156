"""The forest plot of STUDY.md: every arm's difference to its matched control, by start."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from microlm.files import atomic_file
from microlm.research.study.analysis import arm_results
from microlm.research.study.sections import section

COLOURS = {"control": "#2f6db3", "scratch": "#d1571e"}
MARKERS = {"control": "o", "scratch": "^"}  # tell them apart in grey print
INK, FAINT = "#22222a", "#8a8a92"


def draw_arms(rows: pd.DataFrame, path: Path) -> None:
    """Write the PNG: the same bytes for the same numbers."""
    figure = arms_figure(section(rows, "arms"))
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})


def arms_figure(rows: pd.DataFrame) -> Figure:
    """A line for each arm: mean over seeds, its t interval, each seed as a dot; one axes for each start."""
    starts = list(rows["init"].unique()) or ["control"]
    results = arm_results(rows) if len(rows) else []
    arms = list(dict.fromkeys(result.arm for result in results))
    figure = Figure(figsize=(4.2 * len(starts) + 1, 1.6 + 0.42 * len(arms)), layout="constrained", facecolor="white")
    for axes, init in zip(np.atleast_1d(figure.subplots(1, len(starts), sharey=True)), starts):
        here = [result for result in results if result.init == init]
        for result in here:
            height, colour = len(arms) - arms.index(result.arm), COLOURS.get(init, INK)
            found = result.difference
            axes.plot([found.low, found.high], [height, height], color=colour, linewidth=1.6)
            axes.plot(result.each, [height] * len(result.each), ".", color=FAINT, markersize=5)
            axes.plot(found.mean, height, MARKERS.get(init, "o"), color=colour, markersize=7, markeredgecolor="white")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks([len(arms) - place for place in range(len(arms))], arms)
        axes.set_ylim(0.4, len(arms) + 0.6)
        axes.set_title(f"from {init}", loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_xlabel("student - continued, bits per byte", color=INK)
        axes.grid(axis="x", color="#e4e4e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=INK, length=3)
    figure.supxlabel(
        "left of 0: distillation pays; line: 95 % t interval over seeds; dots: seeds",
        x=0.99, ha="right", fontsize=8, color=FAINT,
    )  # fmt: skip
    return figure
