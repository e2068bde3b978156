"""The comparison for a terminal: a table, the differences with their intervals, and what these allow one to say."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from microlm.evaluation import ARMS, GPT2_124M_ACC_NORM, MODELS
from microlm.evaluation.tasks.task import CHANCE
from microlm.report.benchmark_table import benchmark_table, remarks
from microlm.report.summary import COMPARISONS
from microlm.report.text_table import WIDTH, blocks
from microlm.report.text_table import markdown as in_markdown

NORMAL_95 = 1.96  # standard errors each side of a 95 % interval
MEASURES = {
    "val_bpb": "validation bits per byte",
    "ood_bpb": "outside text, bits per byte",
    "gold_bpb": "true endings, bits per byte",
    "acc_norm": "HellaSwag acc_norm",
    "centred_mean": "centred mean of all accuracies",
}

_BENCHMARKS = (
    "Benchmarks: 100 x the metric ± one standard error, with task, metric, protocol, exemplars and questions; blind is "
    "what naming the most frequent label scores, or guessing where labels have no names."
)

Summary = Mapping[str, Any]


def report_text(summary: Summary) -> str:
    """The whole report from metrics/summary.json, in lines of at most 96 columns. KeyError if an entry is missing."""
    windows = f"Validation: {summary['windows']:,} windows"
    if "outside_windows" in summary:
        windows += f"; outside, text of another kind than the corpus: {summary['outside_windows']:,}"
    notes = (
        f"{windows}; fewer bits are better. HellaSwag: {summary['questions']:,} questions, zero-shot, completion "
        f"protocol; chance {CHANCE:.4f}; GPT-2 124M {GPT2_124M_ACC_NORM} (published, same protocol, 10,042 questions)."
    )
    parts = [
        *blocks(_model_rows(summary)),
        _wrapped(notes),
        *blocks(_difference_rows(summary)),
        *blocks(benchmark_table(summary["benchmarks"], MODELS)),
        _wrapped(_notes(summary)),
    ]
    said = [_wrapped(sentence, bullet="- ") for sentence in sentences(summary)]
    return "\n\n".join(parts) + "\n\nWhat this allows one to say\n" + "\n".join(said) + "\n"


def markdown(summary: Summary) -> str:
    """The models, their differences and the first sentence: what README.md opens with."""
    grids = _model_rows(summary), _difference_rows(summary)
    return "\n\n".join((*map(in_markdown, grids), sentences(summary)[0])) + "\n"


def benchmarks_markdown(summary: Summary) -> str:
    """Every benchmark, for README.md."""
    table = in_markdown(benchmark_table(summary["benchmarks"], MODELS))
    return f"{table}\n\n{_notes(summary)}\n"


def _notes(summary: Summary) -> str:
    tasks = summary["centred_mean_tasks"]
    mean = (
        f"Centred mean: (accuracy - chance) / (1 - chance), 0 for a guess and 1 for all right, averaged over "
        f"{len(tasks)} task{'s' * (len(tasks) > 1)}: {', '.join(tasks)}; its interval is over their questions."
    )
    return f"{_BENCHMARKS} {mean} {remarks(summary['benchmarks'])}".strip()


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
    """Student against continued, on both yardsticks where there are two: whether they agree."""
    if "ood_bpb" not in d:
        return _on_one_yardstick(d)
    inside, outside = (_found(d, key) for key in ("val_bpb", "ood_bpb"))
    winner = {key: _winner(d, key) for key in ("val_bpb", "ood_bpb")}
    if not any(winner.values()):
        return (
            "Bits per byte do not tell distillation from plain continuation at the same tokens, neither inside the "
            f"corpus's kind of text ({inside}) nor outside it ({outside}). True differences of "
            f"{d['val_bpb_detectable']:.4f} and {d['ood_bpb_detectable']:.4f} would be found four times in five."
        )
    if not winner["val_bpb"]:
        return (
            "Inside the corpus's kind of text bits per byte do not tell distillation from plain continuation at the "
            f"same tokens ({inside}); outside it {winner['ood_bpb']}, by {_size(d, 'ood_bpb')} ({outside})."
        )
    first = f"{winner['val_bpb']} at the same tokens, by {_size(d, 'val_bpb')}"
    if winner["ood_bpb"] == winner["val_bpb"]:
        return (
            f"On bits per byte {first} inside the corpus's kind of text ({inside}) and by {_size(d, 'ood_bpb')} "
            f"outside it ({outside})."
        )
    other = "bits per byte do not tell them apart"
    if winner["ood_bpb"]:
        other = f"the other way round: {winner['ood_bpb']}, by {_size(d, 'ood_bpb')}"
    return f"Inside the corpus's kind of text {first} ({inside}); outside it {other} ({outside})."


def _on_one_yardstick(d: Summary) -> str:
    if not _winner(d, "val_bpb"):
        return (
            "Bits per byte do not tell distillation from plain continuation at the same tokens: "
            f"{_found(d, 'val_bpb')}. A true difference of {d['val_bpb_detectable']:.4f} would be found four times in "
            "five."
        )
    span = _found(d, "val_bpb")
    return f"On bits per byte {_winner(d, 'val_bpb')} at the same tokens, by {_size(d, 'val_bpb')} ({span})."


def _found(d: Summary, measure: str) -> str:
    """The interval; before it the difference, where that has not been told as who won by how much."""
    span = f"95 % interval {d[measure + '_low']:+.4f} to {d[measure + '_high']:+.4f}"
    return f"{span}, excludes 0" if _excludes_zero(d, measure) else f"{d[measure]:+.4f}, {span}, covers 0"


def _winner(d: Summary, measure: str) -> str:
    """Who beat whom, "" where the interval does not say."""
    if not _excludes_zero(d, measure):
        return ""
    arms = ["distillation", "plain continuation"]
    return " beat ".join(arms if d[measure] < 0 else reversed(arms))


def _size(d: Summary, measure: str) -> str:
    return f"{abs(d[measure]):.4f}"


def _against_control(summary: Summary) -> str:
    d, more = summary["student_minus_control"], amount(summary["student"]["tokens"])
    found = _change(d, "val_bpb")
    if "ood_bpb" in d:
        outside = _change(d, "ood_bpb")
        apart = f"{found} inside the corpus's kind of text and {outside} outside it"
        found = found if outside == found else apart
    return (
        f"On bits per byte the student is shown {found} than the control it starts from. It also saw {more} tokens "
        f"more: only the comparison with continued, which saw the same tokens, speaks of distillation."
    )


def _change(d: Summary, measure: str) -> str:
    if not _excludes_zero(d, measure):
        return "neither better nor worse"
    return "better" if d[measure] < 0 else "worse"


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
    head = ["model", "parameters", "tokens trained", "validation bits per byte", "HellaSwag acc_norm ± s.e."]
    if "ood_bpb" in summary["student"]:  # shorter words, so that all stands in one line of a terminal
        head = [*head[:2], "tokens", "validation bits/byte", "outside", head[-1]]
    rows = [[*head, "centred mean"]]
    for name in MODELS:
        row = summary[name]
        accuracy = f"{row['acc_norm']:.4f} ± {row['acc_norm_se']:.4f}"
        bits = [f"{row[key]:.4f}" for key in ("val_bpb", "ood_bpb") if key in row]
        cells = [amount(row["parameters"]), _tokens(row), *bits, accuracy, f"{row['centred_mean']:.4f}"]
        rows.append([name, *cells])
    return rows


def _difference_rows(summary: Summary) -> list[list[str]]:
    rows = [["difference [95 % interval, paired]", *(f"{a} - {b}" for a, b in COMPARISONS)]]
    for key, label in MEASURES.items():
        if key not in summary["student_minus_continued"]:
            continue  # there is no outside text
        cells = []
        for a, b in COMPARISONS:
            cells.append(_with_interval(summary[f"{a}_minus_{b}"], key, "+"))
        rows.append([label, *cells])
    return rows


def _with_interval(row: Summary, key: str, sign: str) -> str:
    mean, low, high = (f"{row[key + end]:{sign}.4f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


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
