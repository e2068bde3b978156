"""The sections of STUDY.md that hold results: each a list of Markdown paragraphs, empty where no run speaks of it."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from microlm.report import text_table
from microlm.report.summary_table import amount
from microlm.research.study.results import (
    AGAINST_CONTINUED,
    ArmResult,
    Estimate,
    Rung,
    arm_results,
    estimate,
    ladder_results,
    paired,
)

OWN_SECTION = ("arms", "alpha", "ladder", "random", "flop")
CONTINUED = "continued_val_bpb"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Of at least one row, by column."""
    return text_table.markdown([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)], "---")


def section(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    return rows[rows["section"].isin(names)]


def listed(found: Iterable[object]) -> str:
    return ", ".join(map(str, found)) or "none"


def apart(found: Mapping[str, Estimate]) -> tuple[str, str]:
    """Those whose interval lies below 0, and those whose lies above."""
    below, above = (listed(name for name, value in found.items() if value.sign == sign) for sign in (-1, 1))
    return below, above


def arms(rows: pd.DataFrame, figure: str) -> list[str]:
    rows = section(rows, "arms")
    if rows.empty:
        return []
    return [
        "## The arms against their matched control",
        *_against_continued(rows),
        _hellaswag(rows),
        f"![Student minus continued, by arm]({figure})",
    ]


def markdown(rows: pd.DataFrame) -> str:
    """For the docs: a row for each arm, with student minus continued over seeds.

    The columns are the yardsticks where the runs were scored on several, else the starts.
    """
    results = arm_results(section(rows, "arms"))
    starts = sorted({result.init for result in results})
    head = ["student - continued", *(f"from {start}" for start in starts)]
    if any(result.elsewhere["outside"] for result in results):
        head = ["student - continued", "validation", *results[0].elsewhere]
        where = {start: f" from {start}" * (len(starts) > 1) for start in starts}
        body = [[f"`{r.arm}`{where[r.init]}", r.difference, *(e or "-" for e in r.elsewhere.values())] for r in results]
    else:
        found = {(result.arm, result.init): result.difference for result in results}
        arms = dict.fromkeys(result.arm for result in results)
        body = [[f"`{arm}`", *(found.get((arm, start), "not run") for start in starts)] for arm in arms]
    return text_table.markdown([head, *([str(cell) for cell in line] for line in body)], "---") + "\n"


def others(rows: pd.DataFrame, groups: Mapping[str, str]) -> list[str]:
    """A table for each group (name -> what it is for) that has no section of its own."""
    said = []
    for name, about in groups.items():
        part = section(rows, name)
        if part.empty or name in OWN_SECTION:
            continue
        if part["alpha"].nunique() > 1:
            part = part.assign(label=part["label"] + part["alpha"].map(", alpha {:g}".format))
        said += [f"## {about[:1].upper()}{about[1:] or name}", *_against_continued(part)]
    return said


def _against_continued(rows: pd.DataFrame) -> list[str]:
    """The table of student against continued, what it is, and what it allows to say."""
    results = arm_results(rows)
    outside = any(result.elsewhere["outside"] for result in results)
    body = []
    for result in results:
        means = result.rows.mean(numeric_only=True)
        low, high = means[f"{AGAINST_CONTINUED}_low"], means[f"{AGAINST_CONTINUED}_high"]
        line = {
            "arm": result.arm,
            "start": result.init,
            "seeds": result.difference.seeds,
            "student": f"{means['student_val_bpb']:.4f}",
            "continued": f"{means['continued_val_bpb']:.4f}",
            "student - continued, over seeds": result.difference,
            "within a run": f"[{low:+.4f}, {high:+.4f}]",
            "Holm p": "-" if math.isnan(result.adjusted_p) else f"{result.adjusted_p:.3f}",
        }
        if outside:
            line |= {f"{yardstick}, over seeds": found or "-" for yardstick, found in result.elsewhere.items()}
        body.append(line)
    alphas = ", ".join(f"{value:g}" for value in sorted(rows["alpha"].unique()))
    return [
        table(body),
        f"Bits per byte of validation text, means over seeds; alpha {alphas}. `within a run`: mean "
        f"ends of the runs' own intervals. p: t test over seeds, corrected by Holm for {len(results)} comparisons."
        + " `outside`, `true endings`: student - continued on text of another kind than the corpus, and on HellaSwag's "
        "true endings, uncorrected." * outside,
        "\n".join(f"- {sentence}." for sentence in _said_of_arms(results)),
    ]


def _said_of_arms(results: Sequence[ArmResult]) -> list[str]:
    named: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": [], "untested": []}
    for r in results:
        named[r.verdict].append(f"{r} ({r.difference.mean:+.4f})")
    control = "the matched control, after the correction"
    said = [
        f"Better than {control}: {listed(named['better'])}",
        f"Worse than {control}: {listed(named['worse'])}",
        f"Not told apart from {control}: {listed(named['not told apart'])}",
    ]
    if named["untested"]:
        said.append(f"One seed, hence no test: {listed(named['untested'])}")
    alone = {str(r): r.difference.sign for r in results if r.verdict == "not told apart" and r.difference.sign}
    if alone:
        names = listed(f"{name} ({'below' if sign < 0 else 'above'})" for name, sign in alone.items())
        said.append(f"Their own interval excludes 0, the corrected test does not: {names}")
    signs = [(r, r.rows[AGAINST_CONTINUED]) for r in results]
    same = listed(f"{r} ({'-' if all(x < 0) else '+'})" for r, x in signs if all(x < 0) or all(x > 0))
    return [*said, f"The same sign in every seed: {same}"]


def _hellaswag(rows: pd.DataFrame) -> str:
    found = [(result, estimate(result.rows["student_minus_continued_acc_norm"])) for result in arm_results(rows)]
    excluded = [f"{result} ({value})" for result, value in found if value.sign]
    return (
        "On HellaSwag accuracy the interval over seeds, uncorrected, excludes 0 for "
        f"{len(excluded)} of {len(found)} arms{': ' * bool(excluded)}{', '.join(excluded)}."
    )


def alpha(rows: pd.DataFrame) -> list[str]:
    rows = section(rows, "alpha")
    if rows.empty:
        return []
    values = sorted(rows["alpha"].unique())
    body, said = [], []
    for label, part in rows.groupby("label", sort=False):
        found = {f"{value:g}": estimate(cell[AGAINST_CONTINUED]) for value, cell in part.groupby("alpha")}
        body.append({"student - continued": label} | {f"alpha {v:g}": found.get(f"{v:g}", "") for v in values})
        best = min(found, key=lambda value: found[value].mean)
        below, above = apart(found)
        lowest = f"{label}: lowest mean at alpha {best} ({found[best]})"
        said.append(f"- {lowest}. Interval below 0 at: {below}; above 0 at: {above}.")
    return [
        "## The weight of the teacher",
        table(body),
        f"Bits per byte, mean and interval over seeds, uncorrected; start: {', '.join(sorted(set(rows['init'])))}.",
        "\n".join(said),
    ]


def ladder(rows: pd.DataFrame) -> list[str]:
    rungs = ladder_results(section(rows, "ladder"))
    if not rungs:
        return []
    body = [
        {
            "rung, each keeps those above": rung.label,
            "student - continued": rung.against_continued,
            "student - control": rung.against_control,
            "change of student - control": rung.change or "",
        }
        for rung in rungs
    ]
    return [
        "## From the notebook to reverse KL, one difference at a time",
        table(body),
        "Bits per byte, means and intervals over seeds, uncorrected. `control` is the model that the student starts "
        "from: above 0, training on made it worse. `continued` has the same optimizer, rate and precision as the "
        "rung's student. The change is from the rung above, paired on the seed.",
        "\n".join(f"- {sentence}" for sentence in _said_of_ladder(rungs)),
    ]


def _said_of_ladder(rungs: Sequence[Rung]) -> list[str]:
    first = rungs[0]
    state = {1: "worse", 0: "not shown worse", -1: "better"}[first.against_control.sign]
    said = [f"At rung `{first.label}` the student is {state} than the control it starts from: {first.against_control}."]
    fallen = [rung for rung in rungs if rung.against_control.sign > 0]
    if fallen:
        said.append(f"The student falls below its control (interval above 0) at: {listed(r.label for r in fallen)}.")
        free = next((rung for rung in rungs if rung not in fallen), None)
        if first in fallen and free:
            said.append(f"Going down the table, the fall is first no longer shown at rung `{free.label}`.")
    else:
        said.append("At no rung is the student shown to be worse than its control: there is no fall here to explain.")
    changes = {f"{rung.label} ({rung.change})": rung.change for rung in rungs if rung.change}
    for word, steps in zip(("lower", "raise"), apart(changes)):
        said.append(f"Steps that {word} student - control, interval apart from 0: {steps}.")
    if changes:
        most = min((rung for rung in rungs if rung.change), key=lambda rung: rung.change.mean)
        said.append(f"The largest fall in the mean is at rung `{most.label}`: {most.change}.")
    return said


def cost(rows: pd.DataFrame) -> list[str]:
    """Runs of different groups, paired at equal arithmetic."""
    plain, more = section(rows, "arms"), section(rows, "flop")
    if plain.empty:
        return []
    ratio, tokens = (plain.groupby("init")[key].mean() for key in ("labelling_to_distilling_flops", "tokens"))
    said = [
        "## Cost",
        f"Matched by tokens, as above: student and `continued` each saw {_by_start(tokens.map(amount))}. The teacher "
        f"labelled {amount(plain['teacher_tokens'].iloc[0])} tokens once for all runs; in multiples of the arithmetic "
        f"of one distillation that is {_by_start(ratio.map('{:.2f}'.format))} (2 FLOPs a parameter and token forward, "
        "4 more backward; minillm runs the teacher besides).",
    ]
    if more.empty:
        return said
    reached = (more.groupby("init")["tokens"].mean() / tokens).dropna()
    said.append(
        f"Matched by arithmetic: group `flop` gives `continued` {_by_start(reached.map('{:.2f}'.format))} times the "
        f"tokens, from all of the text; a student that pays for the labelling alone equals "
        f"{_by_start((1 + ratio).map('{:.2f}'.format))} times."
    )
    body, found = [], {}
    for r in arm_results(plain):
        if difference := paired(r.rows, "student_val_bpb", more[more["init"] == r.init], CONTINUED):
            found[str(r)] = difference
            seconds = {f"{name}, s": f"{r.rows[f'{name}_elapsed_s'].mean():.0f}" for name in ("student", "continued")}
            body.append({"arm": r.arm, "start": r.init, "student - continued at equal FLOPs": difference, **seconds})
    if body:
        below, above = apart(found)
        said += [
            table(body),
            "Paired on the seed, uncorrected. At equal arithmetic the student is better (interval below 0) for: "
            f"{below}; `continued` is better for: {above}.",
        ]
    return said


def selection(rows: pd.DataFrame) -> list[str]:
    """Windows chosen by the teacher against others, runs of different groups."""
    rows = section(rows, "arms", "random")
    chosen = rows[rows["windows"] == "difference"]
    body, found = [], {}
    for init in chosen["init"].unique():
        for windows, name in (("cached", "all cached"), ("random", "random")):
            theirs = rows[(rows["windows"] == windows) & (rows["init"] == init)]
            if difference := paired(chosen[chosen["init"] == init], CONTINUED, theirs, CONTINUED):
                found[f"from {init}, against {name} windows"] = difference
                body.append({"start": init, "against windows": name, "continued - continued": difference})
    if not body:
        return []
    below, above = apart(found)
    return [
        "## Windows chosen by difference sampling",
        "Cross-entropy alone, on the windows where the teacher most beats the control, minus the same on other "
        "windows, equal tokens.",
        table(body),
        f"Paired on the seed, uncorrected. The selection is better for: {below}; worse for: {above}.",
    ]


def _by_start(values: pd.Series) -> str:
    """The common value, or each with its start."""
    if values.nunique() == 1:
        return str(values.iloc[0])
    return ", ".join(f"{value} from {init}" for init, value in values.items())
