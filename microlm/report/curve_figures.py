"""The curves as PNG: HellaSwag accuracy and held-out loss, all models together, the same bytes for the same numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from microlm.errors import UserError
from microlm.evaluation import GPT2_124M_ACC_NORM
from microlm.evaluation.tasks.task import CHANCE
from microlm.files import read_made
from microlm.report.figure_style import COLOURS, FAINT, INK, caption, dress, page, save
from microlm.runtime.paths import PLOTS, TRAINED_MODELS

MARKERS = {"control": "o", "continued": "s", "student": "^"}  # tell them apart in grey print
FINE = {"linewidth": 1.1, "linestyle": (0, (2, 1.5))}
OUTSIDE_COLUMN = "ood_bpb"  # in plots/loss too, where there is text of another kind

Curves = Mapping[str, pd.DataFrame]


def read_curves(name: str, columns: list[str]) -> dict[str, pd.DataFrame]:
    """plots/<name>/<model>.csv of each model. UserError if one is absent, empty, or lacks a number in `columns`."""
    curves = {}
    for model, stage in TRAINED_MODELS.items():
        path = PLOTS / name / f"{model}.csv"
        curve = read_made(path, stage, lambda path: pd.read_csv(path)[columns].astype(float))
        if curve.empty or not np.isfinite(curve).all(axis=None):
            raise UserError(f"{path} has a blank cell or no row; make it again with: dvc repro -f -s {stage}")
        curves[model] = curve
    return curves


def draw_figures(items: Mapping[str, int], outside: bool = False) -> list[Path]:
    """Write plots/hellaswag.png and plots/loss.png from the curves.

    Args:
        items: HellaSwag questions behind each point of a model's curve, for its band of one standard error.
        outside: whether the curves of the loss have a point of outside text too.
    """
    loss = ["step", "log10_train", "log10_val", *([OUTSIDE_COLUMN] if outside else [])]
    figures = {
        PLOTS / "hellaswag.png": hellaswag_figure(read_curves("hellaswag", ["step", "acc_norm"]), items),
        PLOTS / "loss.png": loss_figure(read_curves("loss", loss), outside),
    }
    for path, figure in figures.items():
        save(figure, path)
    return list(figures)


def hellaswag_figure(curves: Curves, items: Mapping[str, int]) -> Figure:
    """acc_norm against the step, a band of one standard error around each model, published and chance lines."""
    figure, axes = page("HellaSwag accuracy while training", "accuracy (acc_norm, zero-shot)")
    for model, curve in curves.items():
        p = curve["acc_norm"]
        error = np.sqrt(p * (1 - p) / items[model])
        axes.fill_between(curve["step"], p - error, p + error, color=COLOURS[model], alpha=0.10, linewidth=0)
    _lines(axes, curves, "acc_norm")
    published = f"GPT-2 124M\n{GPT2_124M_ACC_NORM}\n(published)"
    for level, name in ((CHANCE, f"chance\n{CHANCE}"), (GPT2_124M_ACC_NORM, published)):
        axes.axhline(level, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(name, (1, level), ha="left", va="center", fontsize=8.5, color=INK, **place)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, CHANCE - 0.02), max(high, GPT2_124M_ACC_NORM + 0.02))
    _legend(axes, [Line2D([], [], **_style(model), label=model) for model in curves])
    counts = " or ".join(f"{n:,}" for n in sorted(set(items.values())))
    caption(figure, f"bands: one standard error, {counts} questions a point")
    return figure


def loss_figure(curves: Curves, outside: bool) -> Figure:
    """log10 of training and validation loss against the step, nats a token on the right; outside text below."""
    figure, axes = page("Training and validation loss", r"$\log_{10}$ loss (nats per token)", panels=1 + outside)
    for model, curve in curves.items():
        axes.plot(curve["step"], curve["log10_train"], color=COLOURS[model], alpha=0.75, **FINE)
    _lines(axes, curves, "log10_val")
    # matplotlib probes the inverse at 0, where a logarithm would warn
    there_and_back = (lambda log10: np.power(10.0, log10), lambda nats: np.log10(np.maximum(nats, 1e-9)))
    nats = axes.secondary_yaxis("right", functions=there_and_back)
    nats.set_ylabel("loss (nats per token)", color=INK)
    nats.tick_params(colors=INK, length=3)
    nats.spines["right"].set_visible(False)
    handles = [Line2D([], [], **_style(model), label=f"{model}, validation") for model in curves]
    _legend(axes, [*handles, Line2D([], [], color=FAINT, label="training", **FINE)])
    _hide_the_start(axes, curves, ["log10_train", "log10_val"])
    if outside:
        below = figure.axes[1]
        dress(below, "Text of another kind than the corpus", "bits per byte")
        _lines(below, curves, OUTSIDE_COLUMN)
        _hide_the_start(below, curves, [OUTSIDE_COLUMN])
    caption(
        figure,
        "cross-entropy in every arm, the student's too; training: mean of the steps since the point before; "
        "the untrained start is above the frame",
    )
    return figure


def _hide_the_start(axes: Axes, curves: Curves, columns: list[str]) -> None:
    """End a loss's axis above the trained models: the untrained one's loss would flatten the rest, if there is any."""
    trained = pd.concat([curve[curve["step"] > 0] for curve in curves.values()])[columns]
    if not trained.empty:
        lowest, highest = trained.min(axis=None), trained.max(axis=None)
        axes.set_ylim(top=float(highest + 0.04 * (highest - lowest)))


def _style(model: str) -> dict[str, object]:
    marker = {"marker": MARKERS[model], "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    return {"color": COLOURS[model], "linewidth": 1.8, **marker}


def _lines(axes: Axes, curves: Curves, column: str) -> None:
    for model, curve in curves.items():
        every = max(1, len(curve) // 25)  # a long run's markers would merge into a ribbon
        axes.plot(curve["step"], curve[column], **_style(model), markevery=every, label=model, zorder=3)


def _legend(axes: Axes, handles: list[Line2D]) -> None:
    axes.legend(handles=handles, loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, labelcolor=INK)
