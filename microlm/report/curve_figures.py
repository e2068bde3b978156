"""The curves as PNG: HellaSwag accuracy and held-out loss, all arms together, the same bytes for the same numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from microlm.errors import UserError
from microlm.evaluation import ARMS, GPT2_124M_ACC_NORM
from microlm.evaluation.tasks.task import CHANCE
from microlm.report.figure_style import COLOURS, FAINT, INK, caption, dress, page, save
from microlm.report.summary import MADE_BY
from microlm.runtime.paths import PLOTS

MARKERS = {"control": "o", "continued": "s", "student": "^"}  # tell them apart in grey print
FINE = {"linewidth": 1.1, "linestyle": (0, (2, 1.5))}
HELLASWAG_COLUMNS = ["step", "acc_norm"]
LOSS_COLUMNS = ["step", "log10_train", "log10_val"]
OUTSIDE_COLUMN = "ood_bpb"  # in plots/loss too, where there is text of another kind


def read_curves(name: str, columns: list[str], plots: Path = PLOTS) -> dict[str, pd.DataFrame]:
    """plots/<name>/<arm>.csv of each arm. UserError if one is absent, empty, or lacks a number in `columns`."""
    curves = {}
    for arm in ARMS:
        path, stage = plots / name / f"{arm}.csv", MADE_BY[arm]
        try:
            curve = pd.read_csv(path)
            curves[arm] = curve[columns].astype(float)
        except FileNotFoundError:
            raise UserError(f"{path} is not there; make it with: dvc repro {stage}") from None
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged ({reason}); make it again with: dvc repro -f -s {stage}") from None
        if curve.empty or not np.isfinite(curves[arm]).all(axis=None):
            raise UserError(f"{path} has a blank cell or no row; make it again with: dvc repro -f -s {stage}")
    return curves


def draw_figures(items: Mapping[str, int], outside: bool = False, plots: Path = PLOTS) -> list[Path]:
    """Write plots/hellaswag.png and plots/loss.png from the curves in `plots`.

    Args:
        items: HellaSwag questions behind each point of an arm's curve, for its band of one standard error.
        outside: whether the curves of the loss have a point of outside text too.
    """
    loss_columns = [*LOSS_COLUMNS, OUTSIDE_COLUMN] if outside else LOSS_COLUMNS
    figures = {
        "hellaswag": hellaswag_figure(read_curves("hellaswag", HELLASWAG_COLUMNS, plots), items),
        "loss": loss_figure(read_curves("loss", loss_columns, plots)),
    }
    for name, figure in figures.items():
        save(figure, plots / f"{name}.png")
    return [plots / f"{name}.png" for name in figures]


def hellaswag_figure(curves: Mapping[str, pd.DataFrame], items: Mapping[str, int]) -> Figure:
    """acc_norm against the step, a band of one standard error around each arm, published and chance lines."""
    figure, axes = page("HellaSwag accuracy while training", "accuracy (acc_norm, zero-shot)")
    for arm, curve in curves.items():
        p = curve["acc_norm"]
        error = np.sqrt(p * (1 - p) / items[arm])
        axes.fill_between(curve["step"], p - error, p + error, color=COLOURS[arm], alpha=0.10, linewidth=0)
        _line(axes, arm, curve["step"], p, label=arm)
    published = f"GPT-2 124M\n{GPT2_124M_ACC_NORM}\n(published)"
    for level, name in ((CHANCE, f"chance\n{CHANCE}"), (GPT2_124M_ACC_NORM, published)):
        axes.axhline(level, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(name, (1, level), ha="left", va="center", fontsize=8.5, color=INK, **place)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, CHANCE - 0.02), max(high, GPT2_124M_ACC_NORM + 0.02))
    _legend(axes, [Line2D([], [], **_style(arm), label=arm) for arm in curves])
    caption(figure, f"bands: one standard error, {_counts(items)} questions a point")
    return figure


def loss_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """log10 of training and validation loss against the step, nats a token on the right; outside text below."""
    outside = all(OUTSIDE_COLUMN in curve for curve in curves.values())
    figure, axes = page("Training and validation loss", r"$\log_{10}$ loss (nats per token)", panels=1 + outside)
    for arm, curve in curves.items():
        axes.plot(curve["step"], curve["log10_train"], color=COLOURS[arm], alpha=0.75, **FINE)
        _line(axes, arm, curve["step"], curve["log10_val"], label=arm)
    # matplotlib probes the inverse at 0, where a logarithm would warn
    there_and_back = (lambda log10: np.power(10.0, log10), lambda nats: np.log10(np.maximum(nats, 1e-9)))
    nats = axes.secondary_yaxis("right", functions=there_and_back)
    nats.set_ylabel("loss (nats per token)", color=INK)
    nats.tick_params(colors=INK, length=3)
    nats.spines["right"].set_visible(False)
    handles = [Line2D([], [], **_style(arm), label=f"{arm}, validation") for arm in curves]
    handles.append(Line2D([], [], color=FAINT, label="training", **FINE))
    _legend(axes, handles)
    axes.set_ylim(top=_highest_after_start(curves, ["log10_train", "log10_val"]))
    if outside:
        below = figure.axes[1]
        dress(below, "Text of another kind than the corpus", "bits per byte")
        for arm, curve in curves.items():
            _line(below, arm, curve["step"], curve[OUTSIDE_COLUMN], label=arm)
        below.set_ylim(top=_highest_after_start(curves, [OUTSIDE_COLUMN]))
    caption(
        figure,
        "cross-entropy in every arm, the student's too; training: mean of the steps since the point before; "
        "the untrained start is above the frame",
    )
    return figure


def _highest_after_start(curves: Mapping[str, pd.DataFrame], columns: list[str]) -> float | None:
    """Upper limit of a loss's axis: the untrained model's loss would flatten the rest. None where there is no rest."""
    trained = pd.concat([curve[curve["step"] > 0] for curve in curves.values()])[columns]
    lowest, highest = trained.min(axis=None), trained.max(axis=None)
    return None if trained.empty else float(highest + 0.04 * (highest - lowest))


def _style(arm: str) -> dict[str, object]:
    marker = {"marker": MARKERS[arm], "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    return {"color": COLOURS[arm], "linewidth": 1.8, **marker}


def _line(axes: Axes, arm: str, steps: pd.Series, values: pd.Series, label: str) -> None:
    every = max(1, len(steps) // 25)  # a long run's markers would merge into a ribbon
    axes.plot(steps, values, **_style(arm), markevery=every, label=label, zorder=3)


def _legend(axes: Axes, handles: list[Line2D]) -> None:
    axes.legend(handles=handles, loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, labelcolor=INK)


def _counts(items: Mapping[str, int]) -> str:
    return " or ".join(f"{n:,}" for n in sorted(set(items.values())))
