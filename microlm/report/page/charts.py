"""The figures of the page as Vega-Lite specifications, each with its words and the table of its numbers.

Colours are custom properties of the page's style sheet: the figures follow dark, light and print without being drawn
again. Arms have shapes and differences fillings too, so that nothing is told by colour alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from microlm.evaluation import GPT2_124M_ACC_NORM
from microlm.evaluation.tasks.task import CHANCE
from microlm.report.curve_figures import OUTSIDE_COLUMN, Curves

SHAPES = {"control": "circle", "continued": "square", "student": "triangle-up", "teacher": "diamond"}
CURVE_PIXELS = 260
MARK, MARK_OF_MANY, FEW = 64, 12, 40  # square pixels of a mark where a curve has few points, and where it has more
SHARE_ABOVE = 0.06  # of the trained models' range that a loss's axis leaves above them

Spec = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A figure. `spec` is Vega-Lite's; `told` says in words what it shows; head and rows are its numbers."""

    key: str
    title: str
    caption: str
    told: str
    spec: Spec
    head: list[str]
    rows: list[list[str]]


def curve_charts(curves: Curves, hellaswag: Curves, items: Mapping[str, int], tokens_per_step: int) -> list[Chart]:
    """Loss, HellaSwag and bits per byte over the steps; outside text only where every curve has it.

    Args:
        items: HellaSwag questions behind each point of a model's curve.
    """
    columns = {"val_bpb": ("Validation text, bits per byte", "text of the corpus's kind that no arm was trained on")}
    if all(OUTSIDE_COLUMN in curve and np.isfinite(curve[OUTSIDE_COLUMN]).all() for curve in curves.values()):
        columns[OUTSIDE_COLUMN] = "Outside text, bits per byte", "text of another kind than the corpus"
    bits = [
        _line_chart(curves, tokens_per_step, [key], title, f"{said.capitalize()}; fewer bits are better.")
        for key, (title, said) in columns.items()
    ]
    return [_loss_chart(curves, tokens_per_step), _hellaswag_chart(hellaswag, items, tokens_per_step), *bits]


def _loss_chart(curves: Curves, tokens_per_step: int) -> Chart:
    caption = (
        "Cross-entropy in every arm, the student's too. Solid with marks: validation; dashed: training, the mean of "
        "the steps since the point before."
    )
    chart = _line_chart(curves, tokens_per_step, ["val_loss", "train_loss"], "Loss, nats per token", caption)
    scale = chart.spec["encoding"]["y"]["scale"]
    del scale["zero"]  # of a linear one, which the page's script may make of it
    scale["type"] = "log"
    training = {
        "mark": {"type": "line", "strokeDash": [4, 3], "strokeWidth": 1.25, "clip": True},
        "encoding": {"y": _field("train_loss"), "opacity": _faded(0.85)},
    }
    chart.spec["layer"].insert(0, training)
    return chart


def _hellaswag_chart(curves: Curves, items: Mapping[str, int], tokens_per_step: int) -> Chart:
    withband = {}
    for model, curve in curves.items():
        p = curve["acc_norm"]
        error = np.sqrt(p * (1 - p) / items[model])
        withband[model] = curve.assign(low=p - error, high=p + error)
    counts = " or ".join(f"{n:,}" for n in sorted(set(items.values())))
    caption = (
        f"acc_norm, zero-shot, completion protocol. Bands: one standard error; {counts} questions a point. "
        f"Lines: chance, {CHANCE}, and GPT-2 124M, {GPT2_124M_ACC_NORM} (published)."
    )
    chart = _line_chart(withband, tokens_per_step, ["acc_norm"], "HellaSwag, accuracy", caption, more=("low", "high"))
    band = {
        "mark": {"type": "area", "clip": True},
        "encoding": {"y": _field("low"), "y2": {"field": "high"}, "opacity": _faded(0.13, 0.03)},
    }
    levels = [{"level": CHANCE, "name": "chance"}, {"level": GPT2_124M_ACC_NORM, "name": "GPT-2"}]
    where = {"y": _field("level"), "x": None, "color": None}
    lines = {
        "data": {"values": levels},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [6, 4], "color": "var(--ink-2)"}, "encoding": dict(where)},
            {
                "mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 11, "color": "var(--ink-2)"},
                "encoding": {**where, "x": {"value": "width"}, "text": {"field": "name"}},
            },
        ],
    }
    chart.spec["layer"] = [lines, band, *chart.spec["layer"]]
    return chart


def _line_chart(
    curves: Curves,
    tokens_per_step: int,
    shown: Sequence[str],
    title: str,
    caption: str,
    more: Sequence[str] = (),
) -> Chart:
    """A line with marks for each arm of the first column in `shown`; all of these in the tooltip and the table.

    Args:
        more: columns that another layer of the figure takes.
    """
    column = shown[0]
    values: Rows = [
        {"arm": model, "step": int(row["step"]), "tokens": int(row["step"]) * tokens_per_step}
        | {name: round(float(row[name]), 6) for name in (*shown, *more)}
        for model, curve in curves.items()
        for _, row in curve.iterrows()
    ]
    spec = spec_of(values) | {
        "height": CURVE_PIXELS,
        "params": [{"name": "shown", "value": list(curves)}],
        "encoding": {"x": _x("step", "optimizer step"), "y": _y(column), "color": _by_arm(curves, "var(--{})")},
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2, "clip": True}, "encoding": {"opacity": _faded(1)}},
            _marks(curves, shown),
        ],
    }
    if column in LOSSES:
        top = _above_the_trained(curves, shown)
        spec["encoding"]["y"]["scale"] |= {} if top is None else {"domainMax": top}
    head = ["arm", "step", "tokens", *(NAMES[name] for name in shown)]
    rows = [
        [r["arm"], *(f"{r[key]:,}" for key in ("step", "tokens")), *(f"{r[key]:.4f}" for key in shown)] for r in values
    ]
    return Chart(column, title, caption, _told(curves, column), spec, head, rows)


def _marks(curves: Curves, shown: Sequence[str]) -> Spec:
    """A mark of the arm's shape at each point; the one nearest to the pointer grows and tells its numbers."""
    counts = ({"field": name, "format": ","} for name in ("step", "tokens"))
    figures = ({"field": name, "title": NAMES[name], "format": ".4f"} for name in shown)
    size = MARK if max(map(len, curves.values())) <= FEW else MARK_OF_MANY  # or they would merge into a ribbon
    near = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    return {
        "params": [{"name": "near", "select": near}],
        "mark": {
            "type": "point",
            "filled": True,
            "opacity": 1,
            "clip": True,
            "stroke": "var(--card)",
            "strokeWidth": 1,
        },
        "encoding": {
            "opacity": _faded(1),
            "shape": _by_arm(curves, None),
            "size": {"condition": {"param": "near", "empty": False, "value": 160}, "value": size},
            "tooltip": [{"field": "arm"}, *counts, *figures],
        },
    }


NAMES = {
    "val_loss": "validation",
    "train_loss": "training",
    "val_bpb": "bits per byte",
    OUTSIDE_COLUMN: "bits per byte",
    "acc_norm": "accuracy",
}
LOSSES = set(NAMES) - {"acc_norm"}


def _told(curves: Curves, column: str) -> str:
    """The ends of each line, for who does not see it."""
    ends = (
        f"{model} goes from {curve[column].iloc[0]:.3f} at step {curve['step'].iloc[0]:,.0f} "
        f"to {curve[column].iloc[-1]:.3f} at step {curve['step'].iloc[-1]:,.0f}"
        for model, curve in curves.items()
    )
    return f"Line chart over optimizer steps: {'; '.join(ends)}. The table below has every point."


def _above_the_trained(curves: Curves, columns: list[str]) -> float | None:
    """Where a loss's axis ends: the untrained model's loss would flatten the rest. None where nothing was trained."""
    trained = pd.concat([curve[curve["step"] > 0] for curve in curves.values()])[columns]
    if trained.empty:
        return None
    lowest, highest = float(trained.min(axis=None)), float(trained.max(axis=None))
    return round(highest + SHARE_ABOVE * (highest - lowest), 6)


def spec_of(values: Rows) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": values},
    }


def _field(name: str) -> Spec:
    return {"field": name, "type": "quantitative"}


def _x(field: str, title: str) -> Spec:
    return _field(field) | {
        "title": title,
        "axis": {"grid": False, "tickCount": 6, "format": "~s"},
        "scale": {"nice": False, "padding": 8},
    }


def _y(field: str) -> Spec:
    scale = {"zero": False, "nice": False, "padding": 10}
    return _field(field) | {"title": None, "axis": {"tickCount": 5}, "scale": scale}


def _by_arm(curves: Curves, colour: str | None) -> Spec:
    values = [colour.format(model) if colour else SHAPES[model] for model in curves]
    return {"field": "arm", "type": "nominal", "legend": None, "scale": {"domain": list(curves), "range": values}}


def _faded(opacity: float, off: float = 0.1) -> Spec:
    """Of an arm that the page's legend has switched off, next to nothing is left."""
    return {"condition": {"test": "indexof(shown, datum.arm) >= 0", "value": opacity}, "value": off}
