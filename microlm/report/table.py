"""The comparison for a terminal: a table, the differences with their intervals, and what these allow one to say."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from microlm.evaluation import ARMS, GPT2_124M_ACC_NORM, MODELS
from microlm.evaluation.tasks import CHANCE
from microlm.report.benchmarks import benchmark_table, remarks
from microlm.report.grid import WIDTH, blocks
from microlm.report.grid import markdown as in_markdown
from microlm.report.summary import COMPARISONS

NORMAL_95 = 1.96  # standard errors each side of a 95 % interval
MEASURES = {
    "val_bpb": "validation bits per byte",
    "gold_bpb": "true endings, bits per byte",
    "acc_norm": "HellaSwag acc_norm",
}

_BENCHMARKS = (
    "Benchmarks: 100 x the metric ± one standard error, with task, metric, protocol, exemplars and questions; majority "
    "is what naming the most frequent label scores."
)

Summary = Mapping[str, Any]


def report_text(summary: Summary) -> str:
    """The whole report from metrics/summary.json, in lines of at most 96 columns. KeyError if an entry is missing."""
    notes = (
        f"Validation: {summary['windows']:,} windows; fewer bits are better. HellaSwag: {summary['questions']:,} "
        f"questions, zero-shot, completion protocol; chance {CHANCE:.4f}; GPT-2 124M {GPT2_124M_ACC_NORM} "
        f"(published, same protocol, 10,042 questions)."
    )
    parts = [
        *blocks(_model_rows(summary)),
        _wrapped(notes),
        *blocks(_difference_rows(summary)),
        *blocks(benchmark_table(summary["benchmarks"], MODELS)),
        _wrapped(f"{_BENCHMARKS} {remarks(summary['benchmarks'])}"),
    ]
    said = [_wrapped(sentence, bullet="- ") for sentence in sentences(summary)]
    return "\n\n".join(parts) + "\n\nWhat this allows one to say\n" + "\n".join(said) + "\n"


def markdown(summary: Summary) -> str:
    """The tables and the first sentence, for README.md."""
    grids = _model_rows(summary), _difference_rows(summary), benchmark_table(summary["benchmarks"], MODELS)
    notes = f"{_BENCHMARKS} {remarks(summary['benchmarks'])}".strip()
    return "\n\n".join((*map(in_markdown, grids), notes, sentences(summary)[0])) + "\n"


def sentences(summary: Summary) -> list[str]:
    """What the intervals allow and do not allow one to say, in plain words."""
    return [
        _on_bits_per_byte(summary["student_minus_continued"]),
        _against_control(summary),
        _on_hellaswag(summary["student_minus_continued"]),
        _near_chance(summary),
        _teacher_cost(summary),
        "One seed: the intervals cover the luck of which questions and windows were drawn, not that of initial "
        "weights; each is at 95 %, uncorrected for their number. A claim about the method needs several seeds.",
    ]


def _on_bits_per_byte(d: Summary) -> str:
    span = f"95 % interval {d['val_bpb_low']:+.4f} to {d['val_bpb_high']:+.4f}"
    if not _excludes_zero(d, "val_bpb"):
        return (
            f"Bits per byte do not tell distillation from plain continuation at the same tokens: {d['val_bpb']:+.4f}, "
            f"{span}, covers 0. A true difference of {d['val_bpb_detectable']:.4f} would be found four times in five."
        )
    winner, loser = "distillation", "plain continuation"
    if d["val_bpb"] > 0:
        winner, loser = loser, winner
    size = abs(d["val_bpb"])
    return f"On bits per byte {winner} beat {loser} at the same tokens, by {size:.4f} ({span}, excludes 0)."


def _against_control(summary: Summary) -> str:
    d, more = summary["student_minus_control"], amount(summary["student"]["tokens"])
    found = "neither better nor worse"
    if _excludes_zero(d, "val_bpb"):
        found = "better" if d["val_bpb"] < 0 else "worse"
    return (
        f"On bits per byte the student is shown {found} than the control it starts from. It also saw {more} tokens "
        f"more: only the comparison with continued, which saw the same tokens, speaks of distillation."
    )


def _on_hellaswag(d: Summary) -> str:
    mean, low, high, detectable = (100 * d["acc_norm" + end] for end in ("", "_low", "_high", "_detectable"))
    points = f"{mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
    power = f"The smallest true difference it would find four times in five is {detectable:.1f} points"
    if not _excludes_zero(d, "acc_norm"):
        return f"HellaSwag does not tell student from continued ({points}, covers 0). {power}: less may go unseen."
    better = "student" if mean > 0 else "continued"
    return f"HellaSwag is higher for {better} ({points}, excludes 0). {power}."


def _near_chance(summary: Summary) -> str:
    near = [arm for arm in ARMS if summary[arm]["acc_norm"] - NORMAL_95 * summary[arm]["acc_norm_se"] <= CHANCE]
    if not near:
        return f"Each of {', '.join(ARMS[:-1])} and {ARMS[-1]} is above chance ({CHANCE}) on HellaSwag."
    names = " and ".join(filter(None, (", ".join(near[:-1]), near[-1])))
    return (
        f"Not shown to beat guessing ({CHANCE}) on HellaSwag: {names}. Where a 95 % interval of an accuracy reaches "
        f"chance, differences between such accuracies say little about what was learnt."
    )


def _teacher_cost(summary: Summary) -> str:
    labelled, tokens = summary["teacher"]["tokens_labelled"], summary["student"]["tokens"]
    ratio = summary["teacher"]["labelling_to_distilling_flops"]
    matched = amount(tokens * (1 + ratio))
    who = "The teacher, live in every step," if summary["teacher"]["source"] == "live" else "The teacher"
    return (
        f"{who} labelled {amount(labelled)} tokens, about {ratio:.2g} times the arithmetic of the distillation "
        f"itself. The arms are matched by tokens. Matched by arithmetic, continued would see {matched} "
        f"tokens in place of {amount(tokens)}; no such run is here."
    )


def _excludes_zero(difference: Summary, measure: str) -> bool:
    return difference[measure + "_low"] > 0 or difference[measure + "_high"] < 0


def _model_rows(summary: Summary) -> list[list[str]]:
    rows = [["model", "parameters", "tokens trained", "validation bits per byte", "HellaSwag acc_norm ± s.e."]]
    for name in MODELS:
        row = summary[name]
        accuracy = f"{row['acc_norm']:.4f} ± {row['acc_norm_se']:.4f}"
        rows.append([name, amount(row["parameters"]), _tokens(row), f"{row['val_bpb']:.4f}", accuracy])
    return rows


def _difference_rows(summary: Summary) -> list[list[str]]:
    rows = [["difference [95 % interval, paired]", *(f"{a} - {b}" for a, b in COMPARISONS)]]
    for key, label in MEASURES.items():
        cells = []
        for a, b in COMPARISONS:
            d = summary[f"{a}_minus_{b}"]
            cells.append(f"{d[key]:+.4f} [{d[key + '_low']:+.4f}, {d[key + '_high']:+.4f}]")
        rows.append([label, *cells])
    return rows


def _tokens(row: Summary) -> str:
    if "tokens" not in row:
        return "pretrained"
    before = f"{amount(row['tokens_before'])} + " if row["tokens_before"] else ""
    return before + amount(row["tokens"])


def amount(number: float) -> str:
    """Three digits and a unit: 17_500_000 -> 17.5M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= unit:
            scaled = float(f"{number / unit:.3g}")
            return f"{scaled:.{2 - int(math.log10(scaled))}f}{name}"
    return f"{number:.0f}"


def _wrapped(text: str, bullet: str = "") -> str:
    indent = " " * len(bullet)
    return textwrap.fill(text, WIDTH, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)
