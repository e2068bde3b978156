"""metrics/probe.json as the table of docs/distillation.md."""

from collections.abc import Mapping
from typing import Any

from microlm.report import text_table

SHOWN = ("32", "64", "128")  # bytes a token


def markdown(metrics: Mapping[str, Any]) -> str:
    """Per direction a row for each method: error of a position's gradient and of a step's, at each budget."""
    budgets = metrics["bytes_per_token"]
    head = [f"{budget} B" for budget in SHOWN]
    blocks = []
    for direction in ("forward", "reverse"):
        names = list(budgets[SHOWN[-1]][direction]["methods"])
        names += [name for name in budgets[SHOWN[0]][direction]["methods"] if name not in names]
        rows = [[f"{direction} KL", *head]]
        rows += [[name, *(_cell(budgets[budget][direction], name) for budget in SHOWN)] for name in names]
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
    return " / ".join(
        f"**{found[key]:.3f}**" if at_budget["best"][key] == name else f"{found[key]:.3f}"
        for key in ("relative_error", "step_error")
    )
