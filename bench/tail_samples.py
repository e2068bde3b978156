"""How far a summed forward-KL gradient is from the exact one as more positions are summed, at some 128 bytes each: what
a cap leaves is a bias and stays, what samples of the tail leave is noise and falls. Against full logits.

    python -m bench.tail_samples [--windows 254]     # validation windows; run it after `make repro`
"""

import argparse

import pandas as pd

from microlm.config import load_config
from microlm.errors import run_stage
from microlm.research.probe.methods import METHODS
from microlm.research.probe.run import positions_added
from microlm.runtime.device import set_up

ENTRIES = {"capped": 32, "compact capped": 40, "head + samples": 20}  # 136, 124 and 128 bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=254)
    windows, config = parser.parse_args().windows, load_config()
    chosen = tuple(method for method in METHODS if method.name in ENTRIES)
    rows, shown_at = [], config.at.teacher.batch_rows
    ks = tuple(sorted(set(ENTRIES.values())))
    for count, measured in enumerate(positions_added(config, set_up(config.at.runtime), windows, chosen, ks), 1):
        last = count * config.at.teacher.batch_rows >= windows
        if count * config.at.teacher.batch_rows >= shown_at or last:
            shown_at *= 2
            rows.append({"positions": measured.positions, **errors(measured.table())})
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format))


def errors(table: pd.DataFrame) -> dict[str, float]:
    """Relative error of the LM head's gradient summed over all positions so far."""
    forward = table[table["direction"] == "forward"].set_index(["method", "k"])["whole_error"]
    return {method: float(forward[method, k]) for method, k in ENTRIES.items()}


if __name__ == "__main__":
    run_stage(main)
