"""The probe: every layout of a cache on real validation text, with the teacher's and the control's full logits.

For people, gradient error against bytes a token as a figure, and metrics/probe.json as a table.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from microlm.config import Config
from microlm.corpus.batches import evenly_spaced, read_batch, window_count
from microlm.corpus.shards import TokenShards
from microlm.files import atomic_file, write_json
from microlm.models import model_files
from microlm.models.interface import LanguageModel
from microlm.models.teacher_source import teacher_source
from microlm.report import text_table
from microlm.report.figure_style import FAINT, INK, save
from microlm.research.probe.dense_positions import TailModel
from microlm.research.probe.measure import CHUNK, DIRECTIONS, KS, STEP_POSITIONS, Probe
from microlm.research.probe.methods import METHODS, Method
from microlm.runtime.device import Runtime
from microlm.runtime.paths import CONTROL, METRICS, PLOTS, SHARDS
from microlm.runtime.terminal import banner, progress_bar
from microlm.teacher.cache import cache_identity
from microlm.teacher.recorders import load_fitting_teacher

RESULT, TABLE, FIGURE = METRICS / "probe.json", PLOTS / "probe.csv", PLOTS / "probe.png"
BUDGETS = (32, 36, 64, 114, 128, 312)  # bytes a token; 36, 114 and 312 are peers' own layouts
CRITERIA = ("relative_error", "step_error", "cosine")
LEARNING_POSITIONS = 4096  # of the training split, from which the tail shapes are learned
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


def probe(config: Config, runtime: Runtime) -> None:
    """Measure, then write metrics/probe.json, plots/probe.csv and plots/probe.png.

    Raises:
        UserError: the shards, models/control or the teacher are absent or do not go together.
    """
    *_, measured = positions_added(config, runtime, config.at.probe.windows)
    table = measured.table()
    with atomic_file(TABLE, "w") as file:
        table.to_csv(file, index=False, float_format="%.6g")
    draw(table, FIGURE)
    write_json(RESULT, summary(table, config, measured.positions))


@torch.inference_mode()
def positions_added(
    config: Config, runtime: Runtime, windows: int, methods: tuple[Method, ...] = METHODS, ks: tuple[int, ...] = KS
) -> Iterator[Probe]:
    """The same probe after every batch of at most `windows` validation windows. UserError as `probe`."""
    train, val = TokenShards(SHARDS, "train"), TokenShards(SHARDS, "val")
    student = model_files.load_student(CONTROL, runtime.dtype).to(runtime.device).eval()
    identity = cache_identity(config.at.teacher, config.at.batch.seq_len, train)
    with config.naming_keys():
        teacher = load_fitting_teacher(teacher_source(config.at.teacher), identity, runtime)
    chosen = evenly_spaced(window_count(val, identity.seq_len), windows)
    positions = len(chosen) * identity.seq_len
    banner(
        f"probe: {config.at.teacher.model} against {CONTROL}",
        [*runtime.lines(), f"text     {positions:,} validation positions, full logits of both"],
    )
    rows = config.at.teacher.batch_rows
    with progress_bar(positions, 0, "tok", "probe") as bar:
        heads = [model.head_weight[: identity.n_vocab].float() for model in (teacher, student)]
        learned = evenly_spaced(window_count(train, identity.seq_len), max(1, LEARNING_POSITIONS // identity.seq_len))
        states = [h for (h,) in _hidden_states((teacher,), train, learned, identity.seq_len, rows)]
        measured = Probe(TailModel.fit(torch.cat(states), heads[0]), heads[1].shape[1], config.seed, ks, methods)
        for hidden in _hidden_states((teacher, student), val, chosen, identity.seq_len, rows):
            for of_both in zip(*(of_one.split(CHUNK) for of_one in hidden)):
                measured.add(*(h @ weight.T for h, weight in zip(of_both, heads)), *of_both)
                bar.update(len(of_both[0]))
            yield measured


def _hidden_states(
    models: tuple[LanguageModel, ...], shards: TokenShards, windows: np.ndarray, seq_len: int, rows: int
) -> Iterator[tuple[Tensor, ...]]:
    """float32 hidden states [N, D] of each model, a batch of windows at a time."""
    device = next(models[0].parameters()).device
    for start in range(0, len(windows), rows):
        tokens = read_batch(shards, windows[start : start + rows], seq_len).tokens.to(device)
        yield tuple(model.hidden(tokens).flatten(0, 1).float() for model in models)


def at_budget(rows: pd.DataFrame, criterion: str, budget: int) -> float | None:
    """A method's criterion at `budget` bytes a token, straight between its measured points on logarithmic scales (the
    cosine's own scale is linear). None outside the bytes that were measured.
    """
    rows = rows.sort_values("bytes")
    if not rows["bytes"].iloc[0] <= budget <= rows["bytes"].iloc[-1]:
        return None
    scale, back = (np.asarray, float) if criterion == "cosine" else (np.log, lambda value: float(np.exp(value)))
    return round(back(np.interp(np.log(budget), np.log(rows["bytes"]), scale(rows[criterion]))), 6)


def summary(table: pd.DataFrame, config: Config, positions: int) -> dict[str, Any]:
    """What metrics/probe.json says: each method at each budget, and the best one."""
    budgets: dict[str, Any] = {}
    for budget in BUDGETS:
        for direction in DIRECTIONS:
            chosen = table[table["direction"] == direction]
            methods = {
                name: {criterion: at_budget(rows, criterion, budget) for criterion in CRITERIA}
                for name, rows in chosen.groupby("method", sort=False)
            }
            methods = {name: numbers for name, numbers in methods.items() if numbers["cosine"] is not None}
            best = {c: min(methods, key=lambda name: methods[name][c]) for c in CRITERIA[:2]} if methods else {}
            budgets.setdefault(str(budget), {})[direction] = {"best": best, "methods": methods}
    exact = table.groupby("direction")["exact_value"].first()
    return {
        "teacher": config.at.teacher.model,
        "student": str(CONTROL),
        "positions": positions,
        "step_positions": min(positions, STEP_POSITIONS),
        "exact_nats": {direction: round(float(exact[direction]), 6) for direction in DIRECTIONS},
        "bytes_per_token": budgets,
    }


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
    save(figure, path, dpi=150)


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
