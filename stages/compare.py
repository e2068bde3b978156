"""Compare the models -> metrics/summary.json, plots/*.png, plots/report.html, models/*/README.md and the report.

--show prints the last report again, --markdown and --benchmarks its tables as README.md has them. --cards writes the
models' cards again, which no checkout and no experiment of DVC's brings.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from microlm.config import Config, load_config
from microlm.errors import UserError, plain, run_stage
from microlm.evaluation import SCORED_MODELS
from microlm.files import read_json, write_json
from microlm.report.curve_figures import draw_figures
from microlm.report.model_card import Asked, refuse_unrun, stale_cards, write_cards
from microlm.report.page.write import write_page
from microlm.report.provenance import origin
from microlm.report.summary import COMPARISONS, benchmark_rows, centred_mean_rows, summarize
from microlm.report.summary_table import benchmarks_markdown, markdown, report_text
from microlm.runtime.paths import METRICS, TRAINED_MODELS
from microlm.runtime.terminal import waiting

SUMMARY = METRICS / "summary.json"
CARDS = "--cards"
TOP = (
    "scale",
    "seed",
    "init",
    "objective",
    "alpha",
    "alpha_schedule",
    "alpha_final",
    "temperature",
    "beta",
    "skew",
    "tail",
)
SHOWN = {
    "--show": lambda summary: "\n" + plain(report_text(summary)),
    "--markdown": markdown,
    "--benchmarks": benchmarks_markdown,
}


def main() -> None:
    asked = sys.argv[1:] or ["--show"]
    if len(asked) > 1 or asked[0] not in (*SHOWN, CARDS):
        raise UserError(
            f"stages.compare: takes one option or none: python -m stages.compare [{' | '.join((*SHOWN, CARDS))}]"
        )
    if not sys.argv[1:]:
        with waiting("compare: intervals and figures"):
            _compare(load_config())
    summary = read_json(SUMMARY, "compare")
    try:
        if asked[0] == CARDS:
            config = load_config()
            refuse_unrun(config.scale)
            written = _write_cards(config, summary)
            print(f"compare: model cards in {', '.join(map(str, written))}")
            return
        print(SHOWN[asked[0]](summary).rstrip("\n"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{SUMMARY} lacks {error}; make it again with: dvc repro -f -s compare") from None
    if sys.argv[1:] == ["--show"]:
        for line in stale_cards(summary):
            print(f"note: {plain(line)}", file=sys.stderr)


def _write_cards(config: Config, summary: dict[str, Any]) -> list[Path]:
    top = {key: getattr(config, key) for key in TOP} | {"start": config.start_kind}
    return write_cards(summary, Asked(top, config.at, config.distills), origin(config.scale))


def _compare(config: Config) -> None:
    distillation = {key: getattr(config, key) for key in ("init", "objective", "alpha", "temperature")}
    draws, seed = config.at.evaluation.bootstrap_draws, config.seed
    summary = summarize(distillation, draws, seed)
    summary["benchmarks"] = benchmark_rows(SCORED_MODELS, draws, seed)
    order = [(task, of.protocol, of.shots) for of in config.at.evaluation.benchmarks for task in of.tasks]
    summary["centred_mean_tasks"], rows = centred_mean_rows(SCORED_MODELS, COMPARISONS, order, draws, seed)
    for name, row in rows.items():
        summary[name] |= row
    items = {name: config.at.continuation.hellaswag_items for name in TRAINED_MODELS}
    items["control"] = config.at.pretrain.hellaswag_items
    draw_figures(items, outside="outside_windows" in summary)
    page = write_page(summary, parameters_of(config), items, config.at.batch.batch_tokens)
    write_json(SUMMARY, summary)
    print(f"{page}: this report as a page, to open in a browser", file=sys.stderr)
    _write_cards(config, summary)


def parameters_of(config: Config) -> dict[str, Any]:
    """Those of the run, by their names in params.yaml; `start`, and what it changes in other blocks, is resolved."""
    block = asdict(config)
    del block["references"], block["log"]  # models of others, and what changes no number
    scale = block.pop("at")
    return block | {"start": config.start_kind, "scales": {config.scale: scale}}


if __name__ == "__main__":
    run_stage(main)
