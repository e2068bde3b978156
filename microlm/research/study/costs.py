"""The sections of STUDY.md that pair runs of different groups: equal arithmetic, and windows chosen by the teacher."""

import pandas as pd

from microlm.report.summary_table import amount
from microlm.research.study.analysis import Estimate, paired
from microlm.research.study.sections import section, table

CONTINUED = "continued_val_bpb"


def cost(rows: pd.DataFrame) -> list[str]:
    plain = section(rows, "arms")
    if plain.empty:
        return []
    ratio = plain.groupby("init")["labelling_to_distilling_flops"].mean()
    tokens = plain.groupby("init")["tokens"].mean()
    said = [
        "## Cost",
        f"Matched by tokens, as above: student and `continued` each saw {_by_start(tokens.map(amount))}. The teacher "
        f"labelled {amount(plain['teacher_tokens'].iloc[0])} tokens once for all runs; in multiples of the arithmetic "
        f"of one distillation that is {_by_start(ratio.map('{:.2f}'.format))} (2 FLOPs a parameter and token forward, "
        "4 more backward; minillm runs the teacher besides).",
    ]
    more = section(rows, "flop")
    if more.empty:
        return said
    reached = (more.groupby("init")["tokens"].mean() / tokens).dropna()
    body, found = [], {}
    for (arm, init), part in plain.groupby(["label", "init"], sort=False):
        difference = paired(part, "student_val_bpb", more[more["init"] == init], CONTINUED)
        if difference:
            found[f"{arm} from {init}"] = difference
            seconds = [f"{part[f'{model}_elapsed_s'].mean():.0f}" for model in ("student", "continued")]
            body.append([str(arm), str(init), str(difference), *seconds])
    head = ["arm", "start", "student - continued at equal FLOPs", "student, s", "continued, s"]
    return [
        *said,
        f"Matched by arithmetic: group `flop` gives `continued` {_by_start(reached.map('{:.2f}'.format))} times the "
        f"tokens, from all of the text; a student that pays for the labelling alone equals "
        f"{_by_start((1 + ratio).map('{:.2f}'.format))} times.",
        *([table(head, body), _sides(found)] if body else []),
    ]


def _sides(found: dict[str, Estimate]) -> str:
    below, above = ([name for name, value in found.items() if getattr(value, side)] for side in ("below", "above"))
    return (
        "Paired on the seed, uncorrected. At equal arithmetic the student is better (interval below 0) for: "
        f"{', '.join(below) or 'none'}; `continued` is better for: {', '.join(above) or 'none'}."
    )


def selection(rows: pd.DataFrame) -> list[str]:
    rows = section(rows, "arms", "random")
    chosen = rows[rows["windows"] == "difference"]
    body, found = [], {}
    for init in chosen["init"].unique():
        mine = chosen[chosen["init"] == init]
        for other in ("cached", "random"):
            theirs = rows[(rows["windows"] == other) & (rows["init"] == init)]
            if difference := paired(mine, CONTINUED, theirs, CONTINUED):
                name = f"from {init}, against {'all cached' if other == 'cached' else other} windows"
                found[name] = difference
                body.append([str(init), "all cached" if other == "cached" else other, str(difference)])
    if not body:
        return []
    below, above = ([name for name, value in found.items() if getattr(value, side)] for side in ("below", "above"))
    return [
        "## Windows chosen by difference sampling",
        "Cross-entropy alone, on the windows where the teacher most beats the control, minus the same on other "
        "windows, equal tokens.",
        table(["start", "against windows", "continued - continued"], body),
        f"Paired on the seed, uncorrected. The selection is better for: {', '.join(below) or 'none'}; worse for: "
        f"{', '.join(above) or 'none'}.",
    ]


def _by_start(values: pd.Series) -> str:
    """The common value, or each with its start."""
    if values.nunique() == 1:
        return str(values.iloc[0])
    return ", ".join(f"{value} from {init}" for init, value in values.items())
