"""What every figure shares: one page, its colours, the same bytes for the same numbers; and the figure of layers."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from microlm.files import atomic_file

# slate, blue and vermilion, as in the templates of .dvc/plots: told apart in every common colour blindness
COLOURS = {"control": "#4c566a", "continued": "#2f6db3", "student": "#d1571e"}
INK, FAINT = "#22222a", "#8a8a92"


def page(title: str, ylabel: str, xlabel: str = "optimizer step", panels: int = 1) -> tuple[Figure, Axes]:
    """A figure and its first axes; more `panels`, lower ones, come below and are yet to `dress`."""
    # a Figure without pyplot: no window system, no global state
    figure = Figure(figsize=(8, 4.6 + 2.6 * (panels - 1)), layout="constrained", facecolor="white")
    axes = figure.subplots(panels, squeeze=False, height_ratios=[1.6, *[1] * (panels - 1)])[0, 0]
    dress(axes, title, ylabel, xlabel)
    return figure, axes


def dress(axes: Axes, title: str, ylabel: str, xlabel: str = "optimizer step") -> None:
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(axis="y", color="#e4e4e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3)


def caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color=FAINT)


def save(figure: Figure, path: Path, dpi: int = 160) -> None:
    with atomic_file(path) as file:
        # the library's version and the date would change the bytes, and DVC would see another output
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def draw_layers(table: pd.DataFrame, path: Path) -> None:
    """A bar for each of the teacher's layers as high as its influence; those that a pruned start keeps are coloured."""
    figure, axes = page("Layers of the teacher, and those that the start keeps", "influence (1 - cosine)", "layer")
    for kept, colour, name in ((1, COLOURS["student"], "kept"), (0, FAINT, "cut")):
        rows = table[table["kept"] == kept]
        if len(rows):
            axes.bar(rows["layer"], rows["influence"], color=colour, label=name)
    axes.legend(frameon=False, fontsize=9)
    caption(figure, "influence: how far a block turns what it is given, mean over tokens of the calibration windows")
    save(figure, path)
