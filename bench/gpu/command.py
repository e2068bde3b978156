"""The command: parts in order of worth, each in a process of its own, until they or the minutes end."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from bench.gpu import table, tiny, unpack
from bench.gpu.book import CUT, FAILED, MEASURED, NOT_RUN, Book
from bench.gpu.device import Card, card_here, cpu, refuse_unfit
from bench.gpu.parts import PARTS
from bench.gpu.setting import Part, Setting
from microlm.errors import UserError, explained, run_stage

FOLDER = Path("bench") / "gpu"
MINUTES = 8.0
GRACE_S = 5.0  # for a part that is stopped to end
STATUS = {"ended": 0, "failed": 1}

_processes = multiprocessing.get_context("forkserver")


def main() -> None:
    asked = _arguments()
    if asked.list:
        print("\n".join(f"{part.name:<10} {part.does}" for part in PARTS))
        return
    root, named = unpack.ROOT, None if asked.file is None else Path(asked.file).resolve()
    os.chdir(root)
    if asked.markdown:
        print(table.markdown(Book(named or _only_file(root / FOLDER))))
        return
    chosen = _chosen(asked.parts)
    card = cpu() if asked.rehearse else refuse_unfit(card_here())
    with tempfile.TemporaryDirectory(prefix="microlm-gpu-") as folder:
        file = named or (Path(folder) / "rehearsal.json" if asked.rehearse else root / FOLDER / card.file_name)
        if asked.rehearse and file.resolve().parent == (root / FOLDER).resolve():
            raise UserError(f"--file: {file} is where a card's figures are; name another place for a rehearsal's")
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        _lay_out(workspace, root, asked.rehearse, chosen)
        setting = Setting(file, root, workspace, asked.rehearse, time.time() + 60 * asked.minutes)
        whole = run_parts(chosen, setting, card)
        print(table.text(Book(file)))
    if not whole:
        sys.exit(1)


def run_parts(chosen: list[Part], setting: Setting, card: Card) -> bool:
    """Run them in order; returns whether every one was measured."""
    book = Book(setting.file)
    book.about({**card.as_json(), "rehearsal": setting.rehearsal})
    # the process that parts are forked from must not touch the driver: by NVML it can look for devices without that
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    _processes.set_forkserver_preload(["bench.gpu.parts", "transformers.models.llama.modeling_llama"])
    for part in chosen:
        estimate_s = 0.0 if setting.rehearsal else part.estimate_s
        if estimate_s > setting.left_s:
            book.not_run(part.name, part.estimate_s)
            print(f"{part.name}: {NOT_RUN} ({part.estimate_s:.0f} s wanted, {max(0.0, setting.left_s):.0f} s left)")
            continue
        print(f"{part.name}: {part.does}", flush=True)
        _run_apart(part.name, setting, book)
        print(f"{part.name}: {book.status(part.name)}", flush=True)
    return all(book.status(part.name) == MEASURED for part in chosen)


def _run_apart(name: str, setting: Setting, book: Book) -> None:
    """A part in a process of its own: what it breaks, the device's state among it, is gone with it."""
    process = _processes.Process(target=run_part, args=(name, setting))
    process.start()
    cut = True
    try:
        process.join(max(0.0, setting.left_s))
        cut = process.is_alive()
    finally:
        if cut:
            _end(process)
    book.reload()
    if cut:
        book.fail(name, "the minutes ended before it did; give it more with --minutes, or run it alone", CUT)
    elif book.status(name) not in (MEASURED, FAILED):
        book.fail(name, f"its process ended with status {process.exitcode}, without a word")


def _end(process: ForkServerProcess) -> None:
    """The part, and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.join(GRACE_S)


def run_part(name: str, setting: Setting) -> None:
    """In the part's own process, which leads a group and works in the workspace once params.yaml has been read."""
    os.setsid()
    part, book = next(part for part in PARTS if part.name == name), setting.book
    began = time.perf_counter()
    book.start(name)
    try:
        os.chdir(setting.root)
        _ = setting.config, setting.runtime
        os.chdir(setting.workspace)
        failed = [key for key, measure in part.run(setting) if not _measured(name, key, measure, book)]
        if failed:
            book.fail(name, f"{len(failed)} without figures, the first is: {failed[0]}")
        else:
            book.finish(name, time.perf_counter() - began)
    except Exception as error:
        book.fail(name, _one_line(error))


def _measured(name: str, key: str, measure: Callable[[], dict[str, Any]], book: Book) -> bool:
    """Note the figures, or why there are none."""
    try:
        figures = measure()
        book.note(name, key, figures)
    except Exception as error:
        figures = {"error": _one_line(error)}
        book.note(name, key, figures)
    print(f"  {key}: {table.figures_line(figures)}", flush=True)
    return "error" not in figures


def _one_line(error: Exception) -> str:
    """What is wrong; of a defect also where, with the rest on stderr."""
    known = explained(error)
    if known is not None:
        return known[0].splitlines()[0].removeprefix("error: ")
    traceback.print_exc()
    at = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
    return f"{type(error).__name__}: {said} ({Path(at.filename).name}:{at.lineno})"


def _lay_out(workspace: Path, root: Path, rehearse: bool, chosen: list[Part]) -> None:
    if rehearse:
        tiny.lay_out(workspace, root)
    elif any(part.needs_data for part in chosen):
        unpack.lay_out(workspace, root)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--parts", help="names, e.g. tests,steps; all unless given")
    parser.add_argument("--list", action="store_true", help="the parts and what each does")
    parser.add_argument("--markdown", action="store_true", help="only print the table of the figures in the file")
    parser.add_argument("--rehearse", action="store_true", help="every part at a tiny shape on the CPU")
    parser.add_argument("--file", help="where figures go; bench/gpu/<card>.json unless given, of a rehearsal nowhere")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"all that it may take, {MINUTES:g} unless given"
    )
    return parser.parse_args()


def _chosen(names: str | None) -> list[Part]:
    known = {part.name: part for part in PARTS}
    wanted = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--parts: {name!r} is no part; choose from {', '.join(known)}")
    return [part for part in PARTS if part.name in wanted]


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{FOLDER}: one file of figures is wanted, found {there}; name it with --file")
    return found[0]


def run() -> None:
    run_stage(main)
