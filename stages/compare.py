"""Compare the models -> metrics/summary.json, plots/*.png, plots/report.html and the report.

--show prints the last report again, --markdown and --benchmarks its tables as README.md has them.
"""

import sys
from dataclasses import asdict
from typing import Any

from microlm.config import Config, load_config
from microlm.errors import UserError, plain, run_stage
from microlm.evaluation import SCORED_MODELS
from microlm.files import read_json, write_json
from microlm.report.curve_figures import draw_figures
from microlm.report.page.write import write_page
from microlm.report.summary import COMPARISONS, benchmark_rows, centred_mean_rows, summarize
from microlm.report.summary_table import benchmarks_markdown, markdown, report_text
from microlm.runtime.paths import METRICS, TRAINED_MODELS

SUMMARY = METRICS / "summary.json"
SHOWN = {
    "--show": lambda summary: "\n" + plain(report_text(summary)),
    "--markdown": markdown,
    "--benchmarks": benchmarks_markdown,
}


def main() -> None:
    asked = sys.argv[1:] or ["--show"]
    if len(asked) > 1 or asked[0] not in SHOWN:
        raise UserError(f"stages.compare: takes one option or none: python -m stages.compare [{' | '.join(SHOWN)}]")
    if not sys.argv[1:]:
        _compare(load_config())
    summary = read_json(SUMMARY, "compare")
    try:
        print(SHOWN[asked[0]](summary).rstrip("\n"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{SUMMARY} lacks {error}; make it again with: dvc repro -f -s compare") from None


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


def parameters_of(config: Config) -> dict[str, Any]:
    """Those of the run, by their names in params.yaml; `start`, and what it changes in other blocks, is resolved."""
    block = asdict(config)
    del block["references"]  # models of others
    scale = block.pop("at")
    return block | {"start": config.start_kind, "scales": {config.scale: scale}}


if __name__ == "__main__":
    run_stage(main)
