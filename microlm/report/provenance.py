"""Which commit and which command made what is here, as a person would type it again."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from microlm.files import read_yaml

PARAMS = "params.yaml"
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a text that Hydra reads as one without quotes
CODE = ("microlm", "stages", "dvc.yaml")


@dataclass(frozen=True)
class Origin:
    """Of a run.

    Attributes:
        commit: that is checked out; "" where this is no Git repository with a params.yaml.
        edited: whether its code was changed since.
        overrides: of its params.yaml, as `dvc exp run -S` takes them.
    """

    commit: str = ""
    edited: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """That makes all models, from the commit on."""
        if not self.overrides:
            return "dvc repro"
        return " ".join(["dvc exp run", *(f"-S {shlex.quote(one)}" for one in self.overrides)])

    def making(self, parameters: Mapping[str, Any], weights: str) -> str:
        """Markdown: the command, the resolved parameters of a model's training, and what it has to come to."""
        edited = ", with code that was edited since" if self.edited else ""
        where = f"At commit `{self.commit}` of MicroLM{edited}" if self.commit else "In MicroLM"
        listed = yaml.safe_dump(dict(parameters), sort_keys=False, default_flow_style=None, width=110).rstrip()
        return "\n\n".join(
            (
                f"{where}; it makes all three arms:",
                f"```sh\n{self.command}\n```",
                "The parameters of this one's training:",
                f"```yaml\n{listed}\n```",
                f"sha256 of `model.safetensors`: `{weights}`",
            )
        )


def origin(scale: str) -> Origin:
    """Of the folder in which this runs; only the chosen scale's block counts among the overrides."""
    commit, before = _git("rev-parse", "HEAD"), _git("show", f"HEAD:./{PARAMS}")
    if commit is None or before is None:
        return Origin()
    # what is not tracked counts too: a new module may be imported
    edited = bool(_git("status", "--porcelain", "--", *CODE))
    if before == Path(PARAMS).read_bytes():
        return Origin(commit.decode().strip(), edited)
    old, new = _flat(_yaml_of(before), scale), _flat(read_yaml(Path(PARAMS), "", ""), scale)
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    set_ = (f"{'' if key in old else '+'}{key}={_value(value)}" for key, value in changed.items())
    return Origin(commit.decode().strip(), edited, (*set_, *(f"~{key}" for key in old if key not in new)))


def _git(*arguments: str) -> bytes | None:
    """What Git says; None where it fails or is not there."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _yaml_of(content: bytes) -> dict[str, Any]:
    from ruamel.yaml import YAML

    found = YAML(typ="safe", pure=True).load(content.decode())
    return found if isinstance(found, dict) else {}


def _flat(params: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """Keys as DVC writes them -> values; of `scales` the chosen one alone."""
    scales = params.get("scales") or {}
    return dict(_leaves({**params, "scales": {scale: scales.get(scale)}}))


def _leaves(block: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _value(value: Any) -> str:
    """As Hydra's grammar of overrides reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
