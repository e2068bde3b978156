"""The probe: every layout of a cache on real validation text, with the teacher's and the control's full logits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from microlm.config import Config
from microlm.corpus.batches import evenly_spaced, read_batch, window_count
from microlm.corpus.shards import TokenShards
from microlm.files import atomic_file, write_json
from microlm.models import model_files
from microlm.models.interface import LanguageModel
from microlm.models.teacher_source import teacher_source
from microlm.research.probe.dense_positions import TailModel
from microlm.research.probe.measure import CHUNK, DIRECTIONS, KS, STEP_POSITIONS, Probe
from microlm.research.probe.methods import METHODS, Method
from microlm.research.probe.report import draw
from microlm.runtime.device import Runtime
from microlm.runtime.paths import CONTROL, PLOTS, SHARDS
from microlm.runtime.paths import METRICS as _METRICS
from microlm.runtime.terminal import banner, progress_bar
from microlm.teacher.cache import cache_identity
from microlm.teacher.loading import load_fitting_teacher

METRICS, TABLE, FIGURE = _METRICS / "probe.json", PLOTS / "probe.csv", PLOTS / "probe.png"
BUDGETS = (32, 36, 64, 114, 128, 312)  # bytes a token; 36, 114 and 312 are peers' own layouts
CRITERIA = ("relative_error", "step_error", "cosine")
LEARNING_POSITIONS = 4096  # of the training split, from which the tail shapes are learned


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
    write_json(METRICS, summary(table, config, measured.positions))


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
        tails = _learn(teacher, train, identity.seq_len, rows)
        size = student.head_weight.shape[1]
        measured = Probe(identity.n_vocab, size, config.seed, tails, runtime.device, ks, methods)
        heads = [model.head_weight[: identity.n_vocab].float() for model in (teacher, student)]
        for hidden in _hidden_states((teacher, student), val, chosen, identity.seq_len, rows):
            for of_both in zip(*(states.split(CHUNK) for states in hidden)):
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


def _learn(teacher: LanguageModel, shards: TokenShards, seq_len: int, rows: int) -> TailModel:
    windows = evenly_spaced(window_count(shards, seq_len), max(1, LEARNING_POSITIONS // seq_len))
    hidden = torch.cat([h for (h,) in _hidden_states((teacher,), shards, windows, seq_len, rows)])
    return TailModel.fit(hidden, teacher.head_weight[: teacher.n_vocab].detach())


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
