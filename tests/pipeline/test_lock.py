"""The committed results are those of the committed code: dvc.lock is fresh, dvc.yaml names what decides a number."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from microlm.files import read_json
from microlm.report.summary_table import benchmarks_markdown, markdown
from microlm.research.probe.run import markdown as probe_markdown
from microlm.research.study.grid import read_grid, read_yaml
from microlm.research.study.report import notes_of, report_text, rows_of
from microlm.research.study.sections import markdown as study_markdown
from tests.support.clones import ROOT, Clone
from tests.support.forked_python import forked_python

STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage)
    for pipeline in ("dvc.yaml", "measure/dvc.yaml")
    for name, stage in YAML(typ="safe", pure=True).load((ROOT / pipeline).read_text())["stages"].items()
}
SHOWN_IN = {"grid": "README.md", "start": "docs/distillation.md"}  # the table of each study
UP_TO_DATE = "Data and pipelines are up to date."

# What a stage may import without naming it: an edit to these changes no number, or changes it through a named input.
HARMLESS = {
    "microlm/config.py": "refuses, never computes; every stage runs after `check`, which names it",
    "microlm/runtime/terminal.py": "banner and progress bar",
    "microlm/corpus/parts.py": "fetch names it; what it extracts is an input of the others",
    "microlm/corpus/wheels.py": "as parts.py",
    "microlm/corpus/tokenizer.py": "tokenize names it; ids are held against the reference, the shards name them",
    "microlm/corpus/tokenizer_format.py": "as tokenizer.py",
    "microlm/errors.py": "words for people",
    "microlm/models/model_names.py": "refuses what is not there; which weights were found is in the digests",
    "microlm/training/live_curves.py": "shows what the curves' files hold",
    "microlm/files.py": "how bytes reach the disk, not which",
    "microlm/runtime/compilation.py": "a flag, which device.py sets",
    "microlm/runtime/launcher.py": "starts and stops processes; how many, or when, changes no result",
    "microlm/report/text_table.py": "words for people",
    "microlm/runtime/paths.py": "where files lie, not what is in them",
    "microlm/parameters.py": "as config.py",
    "microlm/schema.py": "as config.py",
    "microlm/runtime/resume.py": "where an interrupted stage leaves what it has done",
    "microlm/training/checkpoint.py": "a resumed training gives the same bits",
    "microlm/training/memory.py": "words for people, and what a plan counts",
}
# Imported by many, read by few: a new objective must not cost a new control, an edit of the student not a new cache.
TRAININGS = {"pretrain", "continue", "distill"}
MATTERS_TO = {
    "microlm/runtime/distributed.py": {*TRAININGS, "teacher", "evaluate"},  # the others run in one process
    "microlm/models/teacher_source.py": {"start", "teacher", "distill", "evaluate", "probe", "ledger"},
    "microlm/models/gguf_format.py": {"start", "teacher", "distill", "evaluate", "probe", "ledger"},
    "microlm/models/gguf_models.py": {"start", "teacher", "distill", "evaluate", "probe", "ledger"},
    "microlm/models/transformers_model.py": {"start", "teacher", "distill", "evaluate", "probe", "ledger"},
    "microlm/corpus/metaspace.py": {"teacher", "distill", "evaluate"},  # of a teacher that the others refuse
    "microlm/corpus/metaspace_format.py": {"teacher", "distill", "evaluate"},
    "microlm/teacher/cache.py": {"teacher", "select", "distill", "probe", "ledger"},
    "microlm/teacher/records.py": {"teacher", "select", "distill", "probe", "ledger"},
    "microlm/teacher/capture.py": {"teacher"},
    "microlm/teacher/recorders.py": {"teacher", "distill", "ledger"},
    "microlm/teacher/projection.py": {"teacher", "distill", "evaluate"},  # of a teacher that the ledger refuses
    "microlm/objective/capped_tail.py": {"distill", "ledger"},
    "microlm/objective/divergences.py": {"distill", "ledger", "probe"},
    "microlm/objective/on_policy.py": {"distill"},
    "microlm/objective/schedule.py": {"distill", "ledger"},
    "microlm/objective/tails.py": {"distill", "ledger"},
    "microlm/models/interface.py": {"evaluate"},  # a prefix's keys and values; the rest is types
    "microlm/pipeline/asked_objective.py": {"distill", "ledger"},
    "microlm/pipeline/select.py": {"select"},  # the others read the list that it wrote
    "microlm/models/architecture.py": {"start", *TRAININGS, "select", "evaluate", "probe", "ledger"},
    "microlm/models/student.py": {"start", *TRAININGS, "select", "evaluate", "probe", "ledger"},
    # `teacher` reports the teacher's own loss through these; what it caches does not pass through them
    "microlm/objective/fused_head.py": {"start", *TRAININGS, "select", "evaluate", "ledger"},
    "microlm/objective/vocabulary_blocks.py": {"start", *TRAININGS, "select", "evaluate", "ledger"},
    "microlm/evaluation/scoring/held_out_loss.py": {"start", *TRAININGS, "select", "evaluate"},
}


def is_fresh(clone: Clone) -> tuple[bool, str]:
    """Whether nothing would run, and what DVC said."""
    ended = clone.run(clone.python, "-m", "dvc", "repro", "-P", "--allow-missing", "--dry", status=None)
    return ended.returncode == 0 and UP_TO_DATE in ended.stdout, ended.stdout + ended.stderr


def test_lock_is_fresh(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    assert (clone.directory / "dvc.lock").is_file(), "no dvc.lock: run dvc repro and commit it"
    fresh, told = is_fresh(clone)
    assert fresh, f"dvc.lock is stale: run dvc repro, then commit dvc.lock, metrics/ and plots/\n{told}"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params.yaml", "\nalpha: ", "\nalpha: 0.123 # "),
        ("params.yaml", "\nseed: ", "\nseed: 99 # "),
        ("stages/check.py", "", "# an edit\n"),
        ("stages/compare.py", "", "# an edit\n"),
        ("metrics/control.json", "{", "{ "),
    ],
)
def test_edit_without_a_run_makes_the_lock_stale(tmp_path: Path, file: str, old: str, new: str) -> None:
    clone = Clone(tmp_path, forked_python())
    path = clone.directory / file
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    fresh, told = is_fresh(clone)
    assert not fresh, told


def imported(file: Path) -> Iterator[str]:
    """Modules of ours that `file` imports, anywhere in it, as paths from the top folder."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in candidates:
            path = name.replace(".", "/") + ".py"
            if path.startswith("microlm/") and (ROOT / path).is_file():
                yield path


def reached(file: str, known: set[str]) -> set[str]:
    """`file` and all that it imports, directly or not, stopping at what is harmless."""
    if file in known or file in HARMLESS:
        return known
    known.add(file)
    for path in imported(ROOT / file):
        reached(path, known)
    return known


@pytest.mark.parametrize("name", STAGES)
def test_stage_names_every_module_that_can_change_its_numbers(name: str) -> None:
    stage = STAGES[name]
    module = stage["cmd"].split()[2].replace(".", "/") + ".py"
    rooms = {dep for dep in stage["deps"] if (ROOT / dep).is_dir() and dep.startswith("microlm/")}
    named = {path for path in stage["deps"] if path.endswith(".py")}
    needed = {path for path in reached(module, set()) if name in MATTERS_TO.get(path, STAGES)}
    housed = {path for path in needed | named if any(Path(path).is_relative_to(room) for room in rooms)}
    assert sorted(needed - named - housed) == [], f"{name}: add to deps in dvc.yaml, or to HARMLESS with a reason"
    assert sorted(named & housed) == [], f"{name}: these lie in a room that is named too"
    assert [room for room in rooms if not any(Path(path).is_relative_to(room) for path in needed)] == []
    assert sorted(named - needed - set(HARMLESS)) == [], f"{name}: does not import these; take them out of deps"


def test_names_of_ours_that_cannot_change_numbers_exist() -> None:
    assert [path for path in HARMLESS if not (ROOT / path).is_file()] == []


def test_every_stage_runs_after_the_check_of_the_parameters() -> None:
    makers = {"data/params.ok": "check"}
    for name, stage in STAGES.items():
        for kind in ("outs", "metrics", "plots"):
            makers |= {path: name for path, _ in options(stage, kind)}

    def after_check(name: str) -> bool:
        makes = {makers.get(dep) or makers.get(str(Path(dep).parent)) for dep in STAGES[name]["deps"]} - {None, name}
        return "check" in makes or any(after_check(maker) for maker in makes)

    assert [name for name in STAGES if name != "check" and not after_check(name)] == []


def options(stage: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The outputs of one kind with what dvc.yaml says of each."""
    entries = (out if isinstance(out, dict) else {out: {}} for out in stage.get(kind, ()))
    return [item for entry in entries for item in entry.items()]


@pytest.mark.parametrize("name", STAGES)
def test_no_output_but_the_page_turns_the_run_cache_off(name: str) -> None:
    """`cache: false` under outs: would; under metrics: and plots: it keeps the file in Git and the run cache on.

    The page is written again in seconds; under plots: DVC would try to draw it.
    """
    off = [path for path, said in options(STAGES[name], "outs") if "cache" in said or "persist" in said]
    assert off == (["plots/report.html"] if name == "compare" else [])
    kept = options(STAGES[name], "metrics") + options(STAGES[name], "plots")
    assert [path for path, said in kept if said.get("cache") is not False] == []


@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "study").glob("*.yaml")))
def test_docs_and_report_show_the_committed_study(study: str) -> None:
    grid = read_grid(None, None, read_yaml(ROOT / "params.yaml"), ROOT / "study" / f"{study}.yaml")
    rows, page = rows_of(grid, ROOT), ROOT / SHOWN_IN[study]
    shown = page.read_text().split(f"<!-- {study}:begin -->\n")[1].split(f"<!-- {study}:end -->")[0]
    asked = f"python -m stages.study --study {study}"
    assert shown == study_markdown(rows), f"put what `{asked} --markdown` prints into {page.name}"
    report = report_text(rows, grid, notes_of(grid, ROOT))
    assert (ROOT / grid.report).read_text() == report, f"make it again: {asked} --report"


def test_docs_show_the_committed_probe() -> None:
    docs = (ROOT / "docs" / "distillation.md").read_text()
    shown = docs.split("<!-- probe:begin -->\n")[1].split("<!-- probe:end -->")[0]
    assert shown == probe_markdown(read_json(ROOT / "metrics" / "probe.json", "measure/dvc.yaml:probe")), (
        "put what `python -m stages.probe --markdown` prints between the markers in docs/distillation.md"
    )


@pytest.mark.parametrize(
    ("block", "option", "shown"),
    [("results", "--markdown", markdown), ("benchmarks", "--benchmarks", benchmarks_markdown)],
)
def test_readme_shows_the_committed_results(block: str, option: str, shown: Callable[[dict[str, Any]], str]) -> None:
    readme = (ROOT / "README.md").read_text()
    there = readme.split(f"<!-- {block}:begin -->\n")[1].split(f"<!-- {block}:end -->")[0]
    assert there == shown(read_json(ROOT / "metrics" / "summary.json", "compare")), (
        f"put what `python -m stages.compare {option}` prints between the markers in README.md"
    )
