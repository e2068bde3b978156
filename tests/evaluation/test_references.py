"""`microlm references`: what cannot be had is passed over, a mistake ends the command after what was measured."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from microlm.errors import UserError
from microlm.evaluation.candidates import WeightsNotAvailable, load_candidate
from tests.support.tiny_candidates import Said, as_others_export, microlm, repository
from tests.support.workspace import inside

ASKED = ("--tasks", "cb", "--limit", "8", "--offline")


@pytest.fixture(autouse=True)
def folder(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Without a hub, and with a params.yaml of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with repository(parts) as there:
        shutil.copy("params.yaml", tmp_path)
        for name in ("data", "models"):
            (tmp_path / name).symlink_to(there / name)
        with inside(tmp_path):
            yield tmp_path


def references(*models: str) -> Said:
    listed = "".join(f"- {{model: {model}, revision: null}}\n" for model in models)
    params = Path("params.yaml")
    params.write_text(re.sub(r"(?ms)^references:\n.*?\n\n", f"references:\n{listed}\n", params.read_text()))
    return microlm("references", *ASKED)


def test_the_others_are_measured_where_one_cannot_be_had() -> None:
    said = references("models/llama", "nobody/such-a-model", "models/student")
    assert said.code == 0 and "not measured: model: nobody/such-a-model is not a folder here" in said.err
    assert re.search(r"(?m)^models/llama .*\d", said.out) and re.search(r"(?m)^models/student .*\d", said.out)


def broken(directory: Path) -> None:
    """Scores that are no numbers."""
    as_others_export(Path("models/student"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = math.inf
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def damaged(directory: Path) -> None:
    """Others' weights, cut."""
    shutil.copytree("models/llama", directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("spoil", "told"), [(broken, "not a finite number"), (damaged, "model: spoiled could not be read")]
)
def test_a_mistake_ends_the_command_and_what_was_measured_is_shown(spoil, told: str) -> None:
    spoil(Path("spoiled"))
    said = references("models/llama", "nobody/such-a-model", "spoiled", "models/student")
    assert said.code == 1 and "Traceback" not in said.err
    *_, missing, error = said.err.strip().splitlines()
    assert missing.startswith("not measured: model: nobody/such-a-model ") and error.startswith("error: ")
    assert told in error and "not measured: model: spoiled" not in said.err
    assert re.search(r"(?m)^models/llama .*\d", said.out) and "models/student" not in said.out


def test_only_what_cannot_be_had_counts_as_such() -> None:
    with pytest.raises(WeightsNotAvailable):
        load_candidate("nobody/there", None, torch.float32)
    with pytest.raises(UserError) as error:
        load_candidate("nobody/such a model", None, torch.float32)  # no hub has an id like this
    assert type(error.value) is UserError


def test_the_banner_says_what_was_chosen_without_params_yaml() -> None:
    said = microlm("evaluate", "models/student", *ASKED, "--dtype", "bfloat16")
    assert "  dtype    bfloat16 (as --dtype says)\n" in said.out
    default = microlm("evaluate", "models/student", *ASKED)
    assert "  dtype    float32 (as --dtype says, or its default)\n" in default.out
    assert "params.yaml" not in said.out + default.out
