"""Student minus continued with its intervals, a row for each yardstick and benchmark: the forest plots."""

from collections.abc import Mapping, Sequence
from typing import Any

from microlm.report.page.charts import Chart, Rows, Spec, spec_of

YARDSTICKS = {"val_bpb": "validation text", "ood_bpb": "outside text", "gold_bpb": "true endings"}
MEAN = "centred mean"
ROW_PIXELS = 30
AXIS = {"left": "\N{LEFTWARDS ARROW} student better | continued better \N{RIGHTWARDS ARROW}",
        "right": "\N{LEFTWARDS ARROW} continued better | student better \N{RIGHTWARDS ARROW}"}  # fmt: skip
KEY = "Bars: 95 % intervals, paired. A filled mark: the interval excludes 0; a hollow one: it covers 0."
COLOURS = {"student": "var(--student)", "continued": "var(--continued)", "neither": "var(--ink-2)"}


def forest_charts(summary: Mapping[str, Any]) -> list[Chart]:
    """Bits per byte, where less is better, and accuracies in points, where more is."""
    d = summary["student_minus_continued"]
    bits = [_row(name, d, key, 1, "left") for key, name in YARDSTICKS.items() if key in d]
    points = [
        _row(_benchmark_name(row, summary["benchmarks"]), row["student_minus_continued"], "", 100, "right")
        for row in summary["benchmarks"]
        if "status" not in row
    ]
    points.append(_row(MEAN, d, "centred_mean", 100, "right"))
    return [
        _chart("bits", "Bits per byte", "bits per byte", bits, ".4f", "left"),
        _chart("points", "Accuracy", "points", points, ".1f", "right"),
    ]


def _benchmark_name(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The task; with what sets it apart where it is asked several ways."""
    alike = [other for other in rows if other["task"] == row["task"]]
    return row["task"] if len(alike) == 1 else f"{row['task']}, {row['protocol']}, {row['shots']}-shot"


def _row(name: str, block: Mapping[str, Any], key: str, scale: float, student_side: str) -> dict[str, Any]:
    """`block` has the difference and its ends under `key` and suffixes, a benchmark's under words of their own."""
    ends = [f"{key}_low", f"{key}_high"] if key else ["low", "high"]
    low, high = (round(scale * block[end], 6) for end in ends)
    side = (low > 0) - (high < 0)
    ahead = "neither" if not side else "student" if (side > 0) == (student_side == "right") else "continued"
    return {
        "name": name,
        "difference": round(scale * block[key or "difference"], 6),
        "low": low,
        "high": high,
        "ahead": ahead,
    }


def _chart(key: str, title: str, unit: str, rows: Rows, form: str, student_side: str) -> Chart:
    told = "; ".join(
        f"{row['name']} {row['difference']:+{form}}, interval {row['low']:+{form}} to {row['high']:+{form}}"
        + (", covers 0" if row["ahead"] == "neither" else f", {row['ahead']} better")
        for row in rows
    )
    head = ["measure", f"difference, {unit}", "low", "high", "better"]
    cells = [[r["name"], *(f"{r[end]:+{form}}" for end in ("difference", "low", "high")), r["ahead"]] for r in rows]
    description = f"Forest plot of student minus continued, in {unit}, with 95 % intervals: {told}."
    caption = f"Student minus continued, {unit}. {KEY}"
    return Chart(key, title, caption, description, _forest(rows, AXIS[student_side], form), head, cells)


def _forest(rows: Rows, ends: str, form: str) -> Spec:
    # zero is always in sight, and a row of no width still has an axis
    reach = max([1e-6, *(abs(row[end]) for row in rows for end in ("low", "high"))])
    colour = {"field": "ahead", "type": "nominal", "legend": None}
    colour["scale"] = {"domain": list(COLOURS), "range": list(COLOURS.values())}
    x = {
        "type": "quantitative",
        "title": ends,
        "scale": {"domain": [round(-1.08 * reach, 6), round(1.08 * reach, 6)], "nice": False},
        "axis": {"tickCount": 5, "labelExpr": "datum.value ? format(datum.value, '+~g') : '0'"},
    }
    fields = [("name", "measure", None), ("difference", "difference", f"+{form}"), ("low", "95 % from", f"+{form}"),
              ("high", "to", f"+{form}"), ("ahead", "better", None)]  # fmt: skip
    tooltip = [{"field": f, "title": t} | ({"format": how} if how else {}) for f, t, how in fields]
    fill = {"condition": {"test": "datum.ahead == 'neither'", "value": "var(--card)"}, **colour}
    return spec_of(rows) | {
        "height": ROW_PIXELS * len(rows),
        "encoding": {
            "y": {
                "field": "name",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"grid": False, "ticks": False, "domain": False, "labelPadding": 10, "labelLimit": 150},
            }
        },
        "layer": [
            {
                "data": {"values": [{}]},
                "mark": {"type": "rule", "color": "var(--ink-2)", "strokeWidth": 1.25},
                "encoding": {"x": {"datum": 0, **x}, "y": None},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round"},
                "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "color": colour, "tooltip": tooltip},
            },
            {
                "mark": {"type": "point", "filled": True, "opacity": 1, "strokeWidth": 2.5, "size": 90},
                "encoding": {"x": {"field": "difference", **x}, "stroke": colour, "fill": fill, "tooltip": tooltip},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 10, "color": "var(--ink)"},
                "encoding": {"x": {"value": "width"}, "text": {"field": "difference", "format": f"+{form}"}},
            },
        ],
    }
