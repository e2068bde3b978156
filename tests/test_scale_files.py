"""The files of scale/ fit the pipeline that they start. No cluster runs here: they are parsed, not run."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.clones import ROOT

STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
SCRIPTS = sorted((ROOT / "scale").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_script_is_bash(script: Path) -> None:
    subprocess.run([shutil.which("bash"), "-n", script], check=True)


def test_shared_stages_are_those_of_the_pipeline() -> None:
    text = (ROOT / "scale" / "nodes.sbatch").read_text()
    shared = dict(re.findall(r"(?m)^shared (\S+) (\S+)$", text))
    assert shared and all(STAGES[stage]["cmd"] == f"python -m {module}" for stage, module in shared.items())
    assert all(importlib.util.find_spec(module) for module in shared.values())
    assert all(stage in STAGES for stage in re.findall(r"(?m)^dvc repro (\S+)$", text))


def test_sky_file_is_a_task() -> None:
    task = YAML(typ="safe", pure=True).load((ROOT / "scale" / "sky.yaml").read_text())
    assert task["resources"]["accelerators"].endswith(":8")
    for part in ("setup", "run"):
        subprocess.run([shutil.which("bash"), "-n", "-c", task[part]], check=True)
