"""The sections of STUDY.md that hold results: each a list of Markdown paragraphs, empty where no run speaks of it."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from microlm.report import text_table
from microlm.research.study.analysis import AGAINST_CONTINUED, ArmResult, Rung, arm_results, estimate, ladder_results

OWN_SECTION = ("arms", "alpha", "ladder", "random", "flop")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return text_table.markdown([head, *body], "---")


def section(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    return rows[rows["section"].isin(names)]


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
    if any(result.outside for result in results):
        several = len({result.init for result in results}) > 1
        lines = (
            [
                f"`{r.arm}`" + f" from {r.init}" * several,
                str(r.difference),
                str(r.outside or "-"),
                str(r.endings or "-"),
            ]
            for r in results
        )
        return table(["student - continued", "validation", "outside", "true endings"], lines) + "\n"
    found = {(result.arm, result.init): result for result in results}
    starts = [start for start in ("control", "scratch") if any(init == start for _, init in found)]
    body = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = [str(found[arm, start].difference) if (arm, start) in found else "not run" for start in starts]
        body.append([f"`{arm}`", *cells])
    return table(["student - continued", *(f"from {start}" for start in starts)], body) + "\n"


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
    head = [
        "arm",
        "start",
        "seeds",
        "student",
        "continued",
        "student - continued, over seeds",
        "within a run",
        "Holm p",
    ]
    outside = any(result.outside for result in results)
    if outside:
        head += ["outside, over seeds", "true endings, over seeds"]
    body = [
        [
            result.arm,
            result.init,
            str(result.difference.seeds),
            f"{result.student:.4f}",
            f"{result.continued:.4f}",
            str(result.difference),
            f"[{result.within[0]:+.4f}, {result.within[1]:+.4f}]",
            "-" if math.isnan(result.adjusted_p) else f"{result.adjusted_p:.3f}",
            *([str(result.outside or "-"), str(result.endings or "-")] if outside else []),
        ]
        for result in results
    ]
    return [
        table(head, body),
        f"Bits per byte of validation text, means over seeds; {_spans(rows['alpha'], 'alpha')}. `within a run`: mean "
        f"ends of the runs' own intervals. p: t test over seeds, corrected by Holm for {len(results)} comparisons."
        + " `outside`, `true endings`: student - continued on text of another kind than the corpus, and on HellaSwag's "
        "true endings, uncorrected." * outside,
        *_said_of_arms(results),
    ]


def _said_of_arms(results: Sequence[ArmResult]) -> list[str]:
    said = []
    for verdict, lead in (
        ("better", "Better than the matched control"),
        ("worse", "Worse than the matched control"),
        ("not told apart", "Not told apart from the matched control"),
    ):
        found = [_named(result) for result in results if result.verdict == verdict]
        said.append(f"- {lead}, after the correction: {', '.join(found) or 'none'}.")
    if untested := [_named(result) for result in results if result.verdict == "untested"]:
        said.append(f"- One seed, hence no test: {', '.join(untested)}.")
    alone = [r for r in results if r.verdict == "not told apart" and (r.difference.below or r.difference.above)]
    if alone:
        names = ", ".join(f"{r.arm} from {r.init} ({'below' if r.difference.below else 'above'})" for r in alone)
        said.append(f"- Their own interval excludes 0, the corrected test does not: {names}.")
    same = [r for r in results if all(x < 0 for x in r.each) or all(x > 0 for x in r.each)]
    named = ", ".join(f"{r.arm} from {r.init} ({'-' if r.each[0] < 0 else '+'})" for r in same)
    said.append(f"- The same sign in every seed: {named or 'none'}.")
    return ["\n".join(said)]


def _named(result: ArmResult) -> str:
    return f"{result.arm} from {result.init} ({result.difference.mean:+.4f})"


def _hellaswag(rows: pd.DataFrame) -> str:
    cells = list(rows.groupby(["label", "init"], sort=False)["student_minus_continued_acc_norm"])
    found = {f"{arm} from {init}": estimate(values) for (arm, init), values in cells}
    apart = [f"{name} ({value})" for name, value in found.items() if value.below or value.above]
    return (
        "On HellaSwag accuracy the interval over seeds, uncorrected, excludes 0 for "
        f"{len(apart)} of {len(found)} arms{': ' + ', '.join(apart) if apart else ''}."
    )


def alpha(rows: pd.DataFrame) -> list[str]:
    rows = section(rows, "alpha")
    if rows.empty:
        return []
    values = sorted(rows["alpha"].unique())
    body, said = [], []
    for label, part in rows.groupby("label", sort=False):
        found = {value: estimate(cell[AGAINST_CONTINUED]) for value, cell in part.groupby("alpha")}
        body.append([str(label), *(str(found.get(value, "")) for value in values)])
        best = min(found, key=lambda value: found[value].mean)
        below, above = ([f"{v:g}" for v, e in found.items() if getattr(e, side)] for side in ("below", "above"))
        said.append(
            f"- {label}: lowest mean at alpha {best:g} ({found[best]}). "
            f"Interval below 0 at: {', '.join(below) or 'none'}; above 0 at: {', '.join(above) or 'none'}."
        )
    return [
        "## The weight of the teacher",
        table(["student - continued", *(f"alpha {value:g}" for value in values)], body),
        f"Bits per byte, mean and interval over seeds, uncorrected; start: {', '.join(sorted(set(rows['init'])))}.",
        "\n".join(said),
    ]


def ladder(rows: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    rungs = ladder_results(section(rows, "ladder"), list(dict.fromkeys(labels)))
    if not rungs:
        return []
    head = ["rung, each keeps those above", "student - continued", "student - control", "change of student - control"]
    body = [
        [rung.label, str(rung.against_continued), str(rung.against_control), str(rung.change or "")] for rung in rungs
    ]
    return [
        "## From the notebook to reverse KL, one difference at a time",
        table(head, body),
        "Bits per byte, means and intervals over seeds, uncorrected. `control` is the model that the student starts "
        "from: above 0, training on made it worse. `continued` has the same optimizer, rate and precision as the "
        "rung's student. The change is from the rung above, paired on the seed.",
        "\n".join(f"- {sentence}" for sentence in _said_of_ladder(rungs)),
    ]


def _said_of_ladder(rungs: Sequence[Rung]) -> list[str]:
    first = rungs[0]
    state = "worse than" if first.against_control.above else "not shown worse than"
    if first.against_control.below:
        state = "better than"
    said = [f"At rung `{first.label}` the student is {state} the control it starts from: {first.against_control}."]
    fallen = [rung.label for rung in rungs if rung.against_control.above]
    if fallen:
        said.append(f"The student falls below its control (interval above 0) at: {', '.join(fallen)}.")
        free = next((rung for rung in rungs[1:] if not rung.against_control.above), None)
        if first.against_control.above and free:
            said.append(f"Going down the table, the fall is first no longer shown at rung `{free.label}`.")
    else:
        said.append("At no rung is the student shown to be worse than its control: there is no fall here to explain.")
    changes = [rung for rung in rungs if rung.change]
    for side, word in (("below", "lower"), ("above", "raise")):
        named = [f"{r.label} ({r.change})" for r in changes if getattr(r.change, side)]
        said.append(f"Steps that {word} student - control, interval apart from 0: {', '.join(named) or 'none'}.")
    if changes:
        most = min(changes, key=lambda rung: rung.change.mean)
        said.append(f"The largest fall in the mean is at rung `{most.label}`: {most.change}.")
    return said


def _spans(values: pd.Series, name: str) -> str:
    different = sorted(values.unique())
    return f"{name} {', '.join(f'{value:g}' for value in different)}"
