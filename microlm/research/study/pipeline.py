"""dvc.yaml as the study needs it: which code decides its numbers, and which runs share which stages' work."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.files import sha256_file, sha256_json
from microlm.research.study.grid import read_yaml
from microlm.runtime.resume import code_files

TARGET = "compare"
# `check` differs between all runs but computes nothing; what `compare` draws from the scores is not a training's doing
_NOT_WORK = {"check", TARGET}
_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class Stage:
    name: str
    definition: Mapping[str, Any]
    deps: list[str]
    params: list[str]
    outs: list[str]


class Pipeline:
    """The stages that `compare` stands on, in the order of dvc.yaml, templates of foreach filled in."""

    def __init__(self, root: Path, scale: str) -> None:
        self.root = root
        stages = [
            stage
            for name, body in read_yaml(root / "dvc.yaml")["stages"].items()
            for stage in _stages(name, body, scale)
        ]
        self._makers = {out: stage.name for stage in stages for out in stage.outs}
        by_name = {stage.name: stage for stage in stages}
        self.stages: dict[str, Stage] = {}
        self._visit(by_name[TARGET], by_name)

    def _visit(self, stage: Stage, by_name: Mapping[str, Stage]) -> None:
        for parent in self._parents(stage):
            if parent not in self.stages and parent not in _NOT_WORK:
                self._visit(by_name[parent], by_name)
        if stage.name not in _NOT_WORK:
            self.stages[stage.name] = stage

    def _parents(self, stage: Stage) -> list[str]:
        """Stages that make a dependency, or a folder around it."""
        around = (place for dep in stage.deps for place in (dep, *map(str, Path(dep).parents)))
        return sorted({self._makers[place] for place in around if place in self._makers} - {stage.name})

    def code(self) -> dict[str, str]:
        """Digest by file of all that decides the numbers besides parameters: source files, and stages of dvc.yaml."""
        files = {file for stage in self.stages.values() for file in code_files(self.root, stage.deps) if file.is_file()}
        digests = {str(file.relative_to(self.root)): sha256_file(file) for file in sorted(files)}
        definitions = {name: stage.definition for name, stage in self.stages.items()}
        return digests | {"dvc.yaml": sha256_json(definitions)}

    def keys(self, params: Mapping[str, Any]) -> dict[str, str]:
        """For each stage a digest of all parameters that it or a stage before it reads: equal keys, equal work."""
        keys: dict[str, str] = {}
        for name, stage in self.stages.items():
            read = {key: _value(params, key) for key in stage.params}
            above = {parent: keys[parent] for parent in self._parents(stage) if parent in keys}
            keys[name] = f"{name}:{sha256_json([read, above])[:16]}"
        return keys


def _stages(name: str, body: Mapping[str, Any], scale: str) -> list[Stage]:
    if "foreach" not in body:
        return [_stage(name, body, {"scale": scale})]
    items = body["foreach"]
    items = items if isinstance(items, dict) else {str(item): item for item in items}
    stages = []
    for key, item in items.items():
        fields = {f"item.{field}": value for field, value in item.items()} if isinstance(item, dict) else {"item": item}
        stages.append(_stage(f"{name}@{key}", body["do"], {"scale": scale, "key": key, **fields}))
    return stages


def _stage(name: str, body: Mapping[str, Any], values: Mapping[str, Any]) -> Stage:
    def filled(entry: Any) -> str:
        text = next(iter(entry)) if isinstance(entry, dict) else str(entry)
        return _TEMPLATE.sub(lambda match: str(values[match[1]]), text)

    listed = {
        key: [filled(entry) for entry in body.get(key, [])] for key in ("deps", "params", "outs", "metrics", "plots")
    }
    definition = {key: sorted(paths) for key, paths in listed.items()} | {"cmd": filled(body["cmd"])}
    made = listed["outs"] + listed["metrics"] + listed["plots"]
    return Stage(name, definition, listed["deps"], listed["params"], made)


def _value(params: Mapping[str, Any], key: str) -> Any:
    node: Any = params
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
