"""plots/report.html out of what stage `compare` has in hand: the same bytes for the same inputs."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from microlm.errors import without_secrets
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.results.store import read_results
from microlm.files import atomic_file, read_json
from microlm.report.curve_figures import OUTSIDE_COLUMN, read_curves
from microlm.report.offline_page import vega_bundle
from microlm.report.page.charts import SHAPES, Chart, curve_charts
from microlm.report.page.forest import forest_charts
from microlm.report.page.samples import read_samples
from microlm.report.page.text import visible
from microlm.report.summary import side_of_zero
from microlm.report.summary_table import (
    amount,
    benchmark_grid,
    benchmark_notes,
    difference_grid,
    model_grid,
    model_notes,
    sentences,
    tokens_of,
)
from microlm.runtime.paths import OUTSIDE, PLOTS, SCORES, SHARDS

PAGE = PLOTS / "report.html"
HERE = Path(__file__).parent
YARDSTICKS = {"val_bpb": "Inside the corpus's kind of text", "ood_bpb": "Outside it"}
AHEAD = {-1: "student", 0: "", 1: "continued"}
WON = {-1: "distillation ahead", 0: "not told apart", 1: "plain continuation ahead"}


def write_page(
    summary: Mapping[str, Any], parameters: Mapping[str, Any], items: Mapping[str, int], tokens_per_step: int
) -> Path:
    """Write the page from the summary, the curves, the models' samples and the manifests of the data.

    Args:
        parameters: of the run, in blocks; shown as they are.
        items: HellaSwag questions behind each point of a model's curve.
        tokens_per_step: of one optimizer step, the same in every arm.

    Raises:
        UserError: a curve, a sample or the bundle of vega is absent or damaged; the page that was there stays.
    """
    page = page_text(summary, parameters, _charts(summary, items, tokens_per_step))
    with atomic_file(PAGE, "w") as file:
        file.write(page)
    return PAGE


def _charts(summary: Mapping[str, Any], items: Mapping[str, int], tokens_per_step: int) -> dict[str, list[Chart]]:
    loss = ["step", "train_loss", "val_loss", "val_bpb", *([OUTSIDE_COLUMN] if "outside_windows" in summary else [])]
    curves, hellaswag = read_curves("loss", loss), read_curves("hellaswag", ["step", "acc_norm"])
    return {"curves": curve_charts(curves, hellaswag, items, tokens_per_step), "forests": forest_charts(summary)}


def page_text(summary: Mapping[str, Any], parameters: Mapping[str, Any], charts: Mapping[str, list[Chart]]) -> str:
    """The page, which runs the scripts that it was written with and loads nothing: its own policy says so."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    scripts = [vega_bundle(), (HERE / "page.js").read_text(encoding="utf-8")]
    first, *others = sentences(summary)
    tables = {"models": model_grid(summary), "differences": difference_grid(summary), "tasks": benchmark_grid(summary)}
    return environment.get_template("page.html").render(
        **charts,
        summary=summary,
        parameters=dict(flat(parameters)),
        hashes=dict(_hashes()),
        samples=read_samples(),
        verdict=first,
        sentences=others,
        facts=_facts(summary, parameters),
        tiles=[_tile(summary["student_minus_continued"], key) for key in YARDSTICKS if key in summary["verdict"]],
        tables=tables,
        notes={"models": model_notes(summary), "tasks": benchmark_notes(summary)},
        specs={chart.key: chart.spec for group in charts.values() for chart in group},
        models=SCORED_MODELS,
        shapes=SHAPES,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        allowed=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )  # fmt: skip


def _tile(difference: Mapping[str, float], key: str) -> dict[str, Any]:
    value, low, high = (f"{difference[key + end]:+.4f}".replace("-", "\N{MINUS SIGN}") for end in ("", "_low", "_high"))
    side = side_of_zero(difference, key)
    return {"where": YARDSTICKS[key], "value": value, "low": low, "high": high, "ahead": AHEAD[side], "won": WON[side]}


def _facts(summary: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    """What was compared, in a few words each."""
    student, teacher = (f"{amount(summary[name]['parameters'])} parameters" for name in ("student", "teacher"))
    loss = (f"{key} {summary[key]}" for key in ("alpha", "temperature"))
    return {
        "student": student,
        "teacher": teacher,
        "objective": ", ".join((summary["objective"], *loss)),
        "trained on": f"{tokens_of(summary['student'])} tokens",
        "start, seed": f"{parameters['start']}, {parameters['seed']}",
    }


def flat(block: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Each parameter by its dotted name, written as YAML has it, without secrets: people mail the page."""
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            yield from flat(dict(enumerate(value)), f"{before}{key}.")
        elif isinstance(value, list):
            yield f"{before}{key}", f"[{', '.join(map(_scalar, value))}]"
        else:
            yield f"{before}{key}", _scalar(value)


def _scalar(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else without_secrets(str(value))


def _hashes() -> Iterator[tuple[str, str]]:
    """sha256 of weights and data, out of what the scores and the data say of themselves."""
    for name in SCORED_MODELS:
        yield f"weights of {name}", read_results(SCORES / name)[0].identity.model_digest
    for folder, stage in ((SHARDS, "tokenize"), (OUTSIDE, "outside")):
        path = folder / "manifest.json"
        if path.is_file():  # there may be no outside text
            told = read_json(path, stage)
            yield from (
                (f"tokens of {folder.name}, {name}", of["digest"]) for name, of in told.get("splits", {}).items()
            )
            if folder == SHARDS and "tokenizer" in told:
                yield "tokenizer", told["tokenizer"]["fingerprint"]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
