"""The comparison for a terminal: a table, the differences with their intervals, and what these allow one to say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from microlm.evaluation import GPT2_124M_ACC_NORM, SCORED_MODELS
from microlm.evaluation.results.store import LEFT_OUT, NOT_AVAILABLE
from microlm.evaluation.tasks.task import CHANCE
from microlm.report.summary import COMPARISONS, side_of_zero
from microlm.report.text_table import Grid, blocks, wrapped
from microlm.report.text_table import markdown as in_markdown
from microlm.runtime.paths import TRAINED_MODELS

NORMAL_95 = 1.96  # standard errors each side of a 95 % interval
MEASURES = {
    "val_bpb": "validation bits per byte",
    "ood_bpb": "outside text, bits per byte",
    "gold_bpb": "true endings, bits per byte",
    "acc_norm": "HellaSwag acc_norm",
    "centred_mean": "centred mean of all accuracies",
}
WINNERS = {-1: "distillation beat plain continuation", 0: "", 1: "plain continuation beat distillation"}
ABSENT = {
    NOT_AVAILABLE: "Data not available",
    LEFT_OUT: "Left out, since their texts are in the corpus",
}

Summary = Mapping[str, Any]


def report_text(summary: Summary) -> str:
    """The whole report from metrics/summary.json, in lines of at most 96 columns. KeyError if an entry is missing."""
    parts = [
        *blocks(model_grid(summary)),
        wrapped(model_notes(summary)),
        *blocks(difference_grid(summary)),
        *blocks(benchmark_grid(summary)),
        wrapped(benchmark_notes(summary)),
    ]
    said = [wrapped(sentence, bullet="- ") for sentence in sentences(summary)]
    return "\n\n".join(parts) + "\n\nWhat this allows one to say\n" + "\n".join(said) + "\n"


def model_notes(summary: Summary) -> str:
    """What the columns of `model_grid` are of."""
    windows = f"Validation: {summary['windows']:,} windows"
    if "outside_windows" in summary:
        windows += f"; outside, text of another kind than the corpus: {summary['outside_windows']:,}"
    return (
        f"{windows}; fewer bits are better. HellaSwag: {summary['questions']:,} questions, zero-shot, completion "
        f"protocol; chance {CHANCE:.4f}; GPT-2 124M {GPT2_124M_ACC_NORM} (published, same protocol, 10,042 questions)."
    )


def markdown(summary: Summary) -> str:
    """The models, their differences and the first sentence: what README.md opens with."""
    grids = model_grid(summary), difference_grid(summary)
    return "\n\n".join((*map(in_markdown, grids), sentences(summary)[0])) + "\n"


def benchmarks_markdown(summary: Summary) -> str:
    """Every benchmark, for README.md."""
    return f"{in_markdown(benchmark_grid(summary))}\n\n{benchmark_notes(summary)}\n"


def model_grid(summary: Summary) -> Grid:
    """A row for each model, the head above them."""
    head = ["model", "parameters", "tokens trained", "validation bits per byte", "HellaSwag acc_norm ± s.e."]
    if "ood_bpb" in summary["student"]:  # shorter words, so that all stands in one line of a terminal
        head = [*head[:2], "tokens", "validation bits/byte", "outside", head[-1]]
    rows = [[*head, "centred mean"]]
    for name in SCORED_MODELS:
        row = summary[name]
        accuracy = f"{row['acc_norm']:.4f} ± {row['acc_norm_se']:.4f}"
        bits = [f"{row[key]:.4f}" for key in ("val_bpb", "ood_bpb") if key in row]
        rows.append([name, amount(row["parameters"]), tokens_of(row), *bits, accuracy, f"{row['centred_mean']:.4f}"])
    return rows


def tokens_of(row: Summary) -> str:
    """That a model was trained on: those of the model that it starts from before its own."""
    if "tokens" not in row:
        return "pretrained"
    before = f"{amount(row['tokens_before'])} + " if row["tokens_before"] else ""
    return before + amount(row["tokens"])


def difference_grid(summary: Summary) -> Grid:
    """A row for each measure, a column for each comparison, with intervals."""

    def cell(row: Summary, key: str) -> str:
        mean, low, high = (f"{row[key + end]:+.4f}" for end in ("", "_low", "_high"))
        return f"{mean} [{low}, {high}]"

    rows = [summary[f"{a}_minus_{b}"] for a, b in COMPARISONS]
    told = {key: label for key, label in MEASURES.items() if key in rows[0]}  # there may be no outside text
    head = ["difference [95 % interval, paired]", *(f"{a} - {b}" for a, b in COMPARISONS)]
    return [head, *([label, *(cell(row, key) for row in rows)] for key, label in told.items())]


def benchmark_grid(summary: Summary) -> Grid:
    """100 times the metric ± one standard error. Those without data are in `benchmark_notes`."""
    table = [["benchmark", *SCORED_MODELS, "blind", "student - continued [95 %]"]]
    for row in summary["benchmarks"]:
        if "status" in row:
            continue
        cells = [f"{100 * row[name]['value']:.1f} ± {100 * (row[name]['se'] or 0):.1f}" for name in SCORED_MODELS]
        blind = "" if row["blind"] is None else f"{100 * row['blind']:.1f}"
        d = row["student_minus_continued"]
        span = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        table.append([_benchmark_name(row), *cells, blind, span])
    return table


def _benchmark_name(row: Summary) -> str:
    return f"{row['task']} {row['metric']}, {row['protocol']}, {row['shots']}-shot, {row['items']:,}"


def benchmark_notes(summary: Summary) -> str:
    """What the cells of `benchmark_grid` are, and what is not among them."""
    tasks = summary["centred_mean_tasks"]
    return (
        "Benchmarks: 100 x the metric ± one standard error, with task, metric, protocol, exemplars and questions; "
        "blind is what naming the most frequent label scores, or guessing where labels have no names. "
        "Centred mean: (accuracy - chance) / (1 - chance), 0 for a guess and 1 for all right, averaged over "
        f"{len(tasks)} task{'s' * (len(tasks) > 1)}: {', '.join(tasks)}; its interval is over their questions. "
        f"{_remarks(summary['benchmarks'])}"
    ).strip()


def _remarks(rows: Sequence[Summary]) -> str:
    """Sentences on the questions that were longer than a model's context and on data that was not there; or none."""
    said = []
    absent: dict[str, dict[str, None]] = {}
    for row in rows:
        if cut := row.get("truncated"):
            counts = ", ".join(f"{n:,} ({name})" for name, n in cut.items())
            said.append(f"Questions of {_benchmark_name(row)} without their start, longer than the context: {counts}.")
        if "status" in row:
            absent.setdefault(ABSENT[row["status"]], {})[row["task"]] = None
    return " ".join([*said, *(f"{why}: {', '.join(names)}." for why, names in absent.items())])


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
    inside, winner = _found(d, "val_bpb"), WINNERS[side_of_zero(d, "val_bpb")]
    detectable = f"{d['val_bpb_detectable']:.4f}"
    first = "bits per byte do not tell distillation from plain continuation at the same tokens"
    if winner:
        first = f"{winner} at the same tokens, by {abs(d['val_bpb']):.4f}"
    if "ood_bpb" not in d:
        if winner:
            return f"On bits per byte {first} ({inside})."
        return f"{first.capitalize()}: {inside}. A true difference of {detectable} would be found four times in five."
    outside, other, size = _found(d, "ood_bpb"), WINNERS[side_of_zero(d, "ood_bpb")], f"by {abs(d['ood_bpb']):.4f}"
    if not winner and not other:
        return (
            f"{first.capitalize()}, neither inside the corpus's kind of text ({inside}) nor outside it ({outside}). "
            f"True differences of {detectable} and {d['ood_bpb_detectable']:.4f} would be found four times in five."
        )
    if winner == other:
        return (
            f"On bits per byte {first} inside the corpus's kind of text ({inside}) and {size} outside it ({outside})."
        )
    second = f"{other}, {size}" if other else "bits per byte do not tell them apart"
    if winner and other:
        second = f"the other way round: {second}"
    return f"Inside the corpus's kind of text {first} ({inside}); outside it {second} ({outside})."


def _found(d: Summary, measure: str) -> str:
    """The interval; before it the difference, where that has not been told as who won by how much."""
    span = f"95 % interval {d[measure + '_low']:+.4f} to {d[measure + '_high']:+.4f}"
    return f"{span}, excludes 0" if side_of_zero(d, measure) else f"{d[measure]:+.4f}, {span}, covers 0"


def _against_control(summary: Summary) -> str:
    d, more = summary["student_minus_control"], amount(summary["student"]["tokens"])
    change = {-1: "better", 0: "neither better nor worse", 1: "worse"}
    found = change[side_of_zero(d, "val_bpb")]
    if "ood_bpb" in d and (outside := change[side_of_zero(d, "ood_bpb")]) != found:
        found = f"{found} inside the corpus's kind of text and {outside} outside it"
    return (
        f"On bits per byte the student is shown {found} than the control it starts from. It also saw {more} tokens "
        f"more: only the comparison with continued, which saw the same tokens, speaks of distillation."
    )


def _on_hellaswag(d: Summary) -> str:
    mean, low, high, detectable = (100 * d["acc_norm" + end] for end in ("", "_low", "_high", "_detectable"))
    points = f"{mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
    power = f"The smallest true difference it would find four times in five is {detectable:.1f} points"
    if not side_of_zero(d, "acc_norm"):
        return f"HellaSwag does not tell student from continued ({points}, covers 0). {power}: less may go unseen."
    better = "student" if mean > 0 else "continued"
    return f"HellaSwag is higher for {better} ({points}, excludes 0). {power}."


def _near_chance(summary: Summary) -> str:
    rows = {name: summary[name] for name in TRAINED_MODELS}
    near = [name for name, row in rows.items() if row["acc_norm"] - NORMAL_95 * row["acc_norm_se"] <= CHANCE]
    if not near:
        return f"Each of {_listed(list(rows))} is above chance ({CHANCE}) on HellaSwag."
    return (
        f"Not shown to beat guessing ({CHANCE}) on HellaSwag: {_listed(near)}. Where a 95 % interval of an accuracy "
        f"reaches chance, differences between such accuracies say little about what was learnt."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _teacher_cost(summary: Summary) -> str:
    labelled, tokens = summary["teacher"]["tokens_labelled"], summary["student"]["tokens"]
    ratio = summary["teacher"]["labelling_to_distilling_flops"]
    who = "The teacher, live in every step," if summary["teacher"]["source"] == "live" else "The teacher"
    return (
        f"{who} labelled {amount(labelled)} tokens, about {ratio:.2g} times the arithmetic of the distillation "
        f"itself. The arms are matched by tokens. Matched by arithmetic, continued would see "
        f"{amount(tokens * (1 + ratio))} tokens in place of {amount(tokens)}; no such run is here."
    )


def amount(number: float) -> str:
    """Three digits and a unit: 17_500_000 -> 17.5M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= unit:
            scaled = float(f"{number / unit:.3g}")
            return f"{scaled:.{2 - int(math.log10(scaled))}f}{name}"
    return f"{number:.0f}"
