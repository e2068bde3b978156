"""dvc.yaml as the study needs it: which code decides its numbers, and which runs share which stages' work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
from dvc.parsing import DataResolver
from dvc.repo import Repo

from microlm.files import sha256_file, sha256_json
from microlm.research.study.grid import read_yaml
from microlm.runtime.resume import code_files

TARGET = "compare"
MADE = ("outs", "metrics", "plots")
# `check` differs between all runs but computes nothing; what `compare` draws from the scores is not a training's doing
_NOT_WORK = {"check", TARGET}


class Pipeline:
    """The stages that `compare` stands on, each after those that it needs."""

    def __init__(self, root: Path, scale: str) -> None:
        self.root = root
        with Repo(str(root), config={"core": {"no_scm": True}}) as repo:  # dvc.yaml as it lies there, in Git or not
            resolver = DataResolver(repo, "", read_yaml(root / "dvc.yaml"))
            resolver.context["scale"] = scale  # not the one that params.yaml chooses
            every = {name: _definition(body) for name, body in resolver.resolve()["stages"].items()}
        makers = {out: name for name, stage in every.items() for kind in MADE for out in stage[kind]}
        self._graph = nx.DiGraph()  # from who makes a dependency, or a folder around it, to who needs it
        for name, stage in every.items():
            around = {place for dep in stage["deps"] for place in (dep, *map(str, Path(dep).parents))}
            self._graph.add_edges_from((makers[place], name) for place in sorted(around & makers.keys()))
        needed = nx.ancestors(self._graph, TARGET) - _NOT_WORK
        self.stages = {name: every[name] for name in nx.topological_sort(self._graph) if name in needed}

    def code(self) -> dict[str, str]:
        """Digest by file of all that decides the numbers besides parameters: source files, and stages of dvc.yaml."""
        files = {file for stage in self.stages.values() for file in code_files(self.root, stage["deps"])}
        digests = {str(file.relative_to(self.root)): sha256_file(file) for file in sorted(files) if file.is_file()}
        return digests | {"dvc.yaml": sha256_json(self.stages)}

    def keys(self, params: Mapping[str, Any]) -> dict[str, str]:
        """For each stage a digest of all parameters that it or a stage before it reads: equal keys, equal work."""
        keys: dict[str, str] = {}
        for name, stage in self.stages.items():
            read = {key: _value(params, key) for key in stage["params"]}
            above = {parent: keys[parent] for parent in self._graph.predecessors(name) if parent in keys}
            keys[name] = f"{name}:{sha256_json([read, above])[:16]}"
        return keys


def _definition(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage runs, reads and makes, without what DVC does with it (`data/parts: {push: false}`)."""
    places = {key: sorted(map(_place, body.get(key, []))) for key in ("deps", "params", *MADE)}
    return places | {"cmd": body["cmd"]}


def _place(entry: str | Mapping[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def _value(params: Mapping[str, Any], key: str) -> Any:
    node: Any = params
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
