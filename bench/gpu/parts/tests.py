"""The tests that need a card, `python -m pytest -m cuda`, file beside file; in a rehearsal as far as a CPU can."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.setting import Figures, Setting

PATTERN = "test_cuda_*.py"
NAMED = 3  # failures that are told by name; the rest are in the report's file


def run(setting: Setting) -> Figures:
    files = sorted((setting.root / "tests" / "cuda").glob(PATTERN))
    started = {file.stem: _start(file, setting) for file in files}
    for name, process in started.items():
        yield name, partial(_outcome, name, process)


def _start(file: Path, setting: Setting) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={Path.cwd() / _report(file.stem)}", str(file)]
    paths = (str(setting.root), os.environ.get("PYTHONPATH"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if setting.rehearsal:
        env["MICROLM_CUDA_TESTS_ON"] = "cpu"
    return subprocess.Popen(
        command, cwd=setting.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _report(name: str) -> str:
    return f"{name}.xml"


def _outcome(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Counts, and of what failed the first names; all that pytest said of it is printed."""
    said, _ = process.communicate()
    if process.returncode not in (0, 1):
        print(said)
        return {
            "error": f"pytest ended with status {process.returncode}: {(said.strip().splitlines() or [''])[-1][:160]}"
        }
    suite = ElementTree.parse(_report(name)).getroot().find("testsuite")
    total, failed, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "skipped"))
    broken = int(suite.get("errors", 0))
    figures = {
        "passed": total - failed - broken - skipped,
        "failed": failed + broken,
        "skipped": skipped,
        "seconds": float(suite.get("time", 0)),
    }
    if process.returncode == 0:
        return figures
    print(said)
    names = [
        case.get("name", "?") for case in suite if case.find("failure") is not None or case.find("error") is not None
    ]
    return figures | {"error": f"{len(names)} failed, among them {', '.join(names[:NAMED])}"}
