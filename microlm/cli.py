"""The evaluator for people, beside the pipeline's stage; what models write; models for elsewhere; a scale's costs.

microlm evaluate models/student [packaged | FOLDER | HUB-ID ...] [--tasks hellaswag,sst2] [--shots 0,5] [--limit 500]
microlm compare models/continued models/student
microlm references
microlm generate models/student packaged --prompt "The city of Rome"
microlm export models/student --gguf
microlm plan [--scale gpt2-124m] [--gpus 8] [--price-per-gpu-hour 2.5]
"""

# Commands import what they run themselves: torch takes seconds, which neither --help nor a refusal should.

import argparse
import difflib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from microlm.commands import export, generate
from microlm.commands.named_models import HELP, load_named, normal_name, refuse_repetition, without_revision
from microlm.config import PARAMS, load_config
from microlm.errors import OneLineParser, UserError, keeping, plain, run_stage
from microlm.evaluation.tasks.benchmarks import Material, benchmarks, gather
from microlm.evaluation.tasks.prompts import PROTOCOLS
from microlm.evaluation.tasks.task import TASKS
from microlm.files import write_json
from microlm.models.model_names import refuse_absent_folder
from microlm.parameters import RuntimeConfig

if TYPE_CHECKING:
    from microlm.evaluation.candidates import Candidate
    from microlm.evaluation.results.store import Result
    from microlm.runtime.device import Runtime

GUIDE = """\
MicroLM: does distillation pay for a small language model? From a clone to a verdict, in this order:

  make setup && . .venv/bin/activate      the environment, once
  dvc repro                               run what is stale: teacher's cache, three models, scores, verdict
  plots/report.html                       its page: verdict, table, curves, samples (open it in a browser)
  dvc exp run -S alpha=0.2                the same with another parameter; all of them are in params.yaml
  dvc metrics diff, dvc plots diff        that against the last commit: numbers, curves
  microlm evaluate models/student         any model's benchmarks; then microlm compare A B, microlm references
  microlm generate, microlm export        what models write, side by side; one for the hub or for llama.cpp
  microlm plan --scale gpt2-124m          hours, memory and money of a larger run, before it is run
  make study                              the arms over three seeds

microlm COMMAND --help has a command's options, README.md all the rest.
"""
OUT = Path("evaluations")
BATCH_TOKENS = 8192
COMPILED_FROM = 2000  # questions; with fewer, compiling the pass over the logits takes longer than it saves


def main() -> None:
    """The console script."""
    run_stage(_run)


def _run() -> None:
    if not sys.argv[1:]:
        print(GUIDE, end="")
        return
    arguments = _parser().parse_args()
    run = {"evaluate": _evaluate, "compare": _compare, "references": _references, "plan": _plan}
    run |= {"generate": generate.run, "export": export.run}
    run[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("microlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scoring = argparse.ArgumentParser(add_help=False)
    add = scoring.add_argument
    add("--tasks", default="hellaswag", help=f"with commas, or all: {', '.join(TASKS)}")
    add("--shots", default="0", help="with commas, e.g. 0,5 (default 0)")
    protocols = f"of {', '.join(PROTOCOLS)} (default: the task's own, completion for HellaSwag)"
    add("--protocol", metavar="NAME", help=protocols)
    add("--limit", type=int, metavar="N", help="a fixed stratified subset of N questions of each task")
    add("--data", type=Path, metavar="FOLDER", help="tasks' files in their published formats")
    add("--offline", action="store_true", help="do not ask the hub for data")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="default float32")
    add("--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="in one forward pass")
    add("--pmi", action="store_true", help="score HellaSwag's endings without their question too")
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="where results lie (evaluations)")
    add("--table", choices=("text", "markdown"), default="text")
    add("--metrics", choices=("all", "primary"), default="all", help="of each task in the table (default all)")
    add = commands.add_parser("evaluate", parents=[scoring], help="score models; run again, it goes on").add_argument
    add("models", nargs="+", metavar="MODEL", help=HELP)
    commands.add_parser("references", parents=[scoring], help="score the hub models that params.yaml lists")
    add = commands.add_parser("compare", help="two models on the same questions: A minus B, paired").add_argument
    for side in ("A", "B"):
        add(side, help="a model as evaluated; several seeds of one arm: A1,A2,A3")
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="where results lie (evaluations)")
    generate.add_parser(commands)
    export.add_parser(commands)
    plan = commands.add_parser("plan", help="tokens, FLOPs, bytes, memory and hours of a scale, before it is run")
    add = plan.add_argument
    add("--scale", metavar="NAME", help="a scale of params.yaml (default: the one it chooses)")
    add("--gpus", type=int, default=1, metavar="N")
    add("--card", metavar="NAME", help="as measured by make gpu: a file of bench/gpu (default the only one)")
    add("--peak-tflops", type=float, help="of one GPU (default the card's; an H100's if none is measured)")
    add("--utilisation", type=float, help="share of the peak (default the card's; 0.4 if none is measured)")
    add("--price-per-gpu-hour", type=float, metavar="X")
    add("--teacher-parameters", type=int, metavar="N", help="of a teacher that is not known here")
    add("--json", action="store_true")
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "peak_tflops", "utilisation", "price_per_gpu_hour", "teacher_parameters"):
        value = getattr(arguments, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')}: {value} is not a number above 0")
    if arguments.utilisation is not None and arguments.utilisation > 1:
        raise UserError(f"--utilisation: {arguments.utilisation:g} is more than the whole; a share, e.g. 0.4")
    from microlm.research.plan.estimate import config_of_scale, disk_here, machine_of, make_plan
    from microlm.research.plan.page import disk_lines, page

    stated = {key: getattr(arguments, key) for key in ("peak_tflops", "utilisation") if getattr(arguments, key)}
    if stated:
        stated["source"] = "as stated"
    asked = {"gpus": arguments.gpus, "price_per_gpu_hour": arguments.price_per_gpu_hour, **stated}
    machine = replace(machine_of(arguments.card), **asked)
    found = make_plan(config_of_scale(arguments.scale), machine, arguments.teacher_parameters)
    disk = disk_here(found)
    print(json.dumps(found | {"disk": disk}, indent=2) if arguments.json else f"{page(found)}\n{disk_lines(disk)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from microlm.evaluation.results.store import model_slug

    names = list(map(normal_name, arguments.models))
    refuse_repetition("MODEL", [model_slug(without_revision(name)[0]) for name in names])
    gathered = _gathered(arguments)
    if len(names) > 1:  # a mistake in the last model is told before the first one is scored
        for name in names:
            _load(name, arguments, gathered)
    with keeping(lambda: f"finished tasks are kept in {arguments.out}"):
        results = [result for name in names for result in _score(name, arguments, gathered)]
    _print_table(results, arguments)


def _print_table(results: "Sequence[Result]", arguments: argparse.Namespace) -> None:
    from microlm.report.evaluation_table import evaluation_text, published_figures, worth_showing

    figures = worth_showing(published_figures(), results)
    print("\n" + plain(evaluation_text(results, figures, arguments.table, arguments.metrics == "all")))


def _gathered(arguments: argparse.Namespace) -> list[Material]:
    for name, value in (("--limit", arguments.limit), ("--batch-tokens", arguments.batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} is less than 1")
    if arguments.data is not None and not arguments.data.is_dir():
        raise UserError(f"--data: {arguments.data} is no folder; name the one that holds the tasks' files")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out: {arguments.out} is no folder; name another, or move the file away")
    names = list(TASKS) if arguments.tasks == "all" else arguments.tasks.split(",")
    refuse_repetition("--tasks", names)
    try:
        shots = [int(number) for number in arguments.shots.split(",")]
    except ValueError:
        raise UserError(f"--shots: {arguments.shots!r} is not whole numbers with commas, e.g. 0,5") from None
    if min(shots) < 0:
        raise UserError(f"--shots: {min(shots)} is less than 0; 0 is the fewest")
    refuse_repetition("--shots", shots)
    asked = benchmarks(names, arguments.protocol, shots, arguments.limit)
    return gather(asked, arguments.data, not arguments.offline)


def _load(name: str, arguments: argparse.Namespace, gathered: Sequence[Material]) -> "tuple[Candidate, Runtime]":
    """The model, once nothing speaks against scoring it."""
    from microlm.evaluation.run import refuse_before_scoring
    from microlm.runtime.device import set_up

    many = sum(len(material.questions) for material in gathered) >= COMPILED_FROM
    runtime = set_up(RuntimeConfig(dtype=arguments.dtype, compile="auto" if many else "off", threads="auto"))
    candidate = load_named(name, runtime.dtype)
    refuse_before_scoring(candidate, gathered, arguments.out)
    return candidate, runtime


def _score(name: str, arguments: argparse.Namespace, gathered: Sequence[Material]) -> "Iterator[Result]":
    """Each benchmark's result as soon as it is there."""
    from microlm.evaluation.run import evaluate
    from microlm.runtime.terminal import banner

    candidate, runtime = _load(name, arguments, gathered)
    candidate.model.to(runtime.device)
    banner(f"{candidate.name}: {candidate.parameters:,} parameters", _choices(runtime, arguments.dtype))
    for result, stood in evaluate(candidate, gathered, arguments.out, arguments.batch_tokens, arguments.pmi):
        if stood:
            print(f"{result.identity.task} ({result.identity.protocol}): was there already", file=sys.stderr)
        yield result


def _choices(runtime: "Runtime", dtype: str) -> list[str]:
    """The banner's lines. params.yaml has no say in them."""
    asked = {"float32": "float32 (as --dtype says, or its default)", "bfloat16": "bfloat16 (as --dtype says)"}
    reasons = {**runtime.reasons, "dtype": asked.get(dtype, runtime.reasons["dtype"])}
    if not runtime.compiled:
        del reasons["compile"]  # it speaks of training
    return replace(runtime, reasons=reasons).lines()


def _references(arguments: argparse.Namespace) -> None:
    from microlm.evaluation.candidates import WeightsNotAvailable

    listed, gathered = load_config(PARAMS).references, _gathered(arguments)
    results: list[Result] = []
    missing: list[UserError] = []
    mistake: UserError | None = None
    for reference in listed:
        name = reference.model if reference.revision is None else f"{reference.model}@{reference.revision}"
        try:
            for result in _score(name, arguments, gathered):
                results.append(result)
        except WeightsNotAvailable as error:
            missing.append(error)
        except UserError as error:  # what was measured before it is shown first
            mistake = error
            break
    if results:
        _print_table(results, arguments)
    for error in missing:
        print(f"not measured: {plain(str(error))}", file=sys.stderr)
    if mistake is not None:
        raise mistake
    if not results:
        raise UserError("params.yaml: references: the weights of none could be had; connect and try again")


def _compare(arguments: argparse.Namespace) -> None:
    sides = [[_results_folder(name, arguments.out) for name in side.split(",")] for side in (arguments.A, arguments.B)]

    from microlm.evaluation.results.metrics import compare
    from microlm.report.evaluation_table import comparison_text

    found = compare(*sides)
    names = ["+".join(folder.name for folder in side) for side in sides]
    write_json(arguments.out / f"{names[0]}-minus-{names[1]}.json", found)
    print("\n" + plain(comparison_text(found)))


def _results_folder(name: str, out: Path) -> Path:
    """The folder of a model's results, by its own path or by the model's name."""
    from microlm.evaluation.results.store import model_slug

    for folder in (out / model_slug(name.partition("@")[0]), Path(name)):
        if folder.is_dir() and any(folder.glob("*shot*.json")):
            return folder
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not Path(name).is_dir() and (close := difflib.get_close_matches(model_slug(name), there, n=1)):
        raise UserError(f"{name}: no results in {out}; did you mean {out / close[0]}?")
    refuse_absent_folder(name.partition("@")[0])
    raise UserError(f"{name}: no results in {out}; make them with: microlm evaluate {name}")
