"""Python on a bare machine with a GPU: what is not installed there is found by nobody, and there is no network.

A tiny run of `python -m bench.gpu` imports torch and transformers in each of its six processes, and does little else.
The `python` that `forking_python` makes runs all that it is given in forks of a server (forked_python.py), which has
imported them in the bare environment.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.clones import ROOT
from tests.support.forked_python import start_server

SITE = """
import socket, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {lacking} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
connect = socket.socket.connect
def connect_here(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"no network: {{address}}")
    return connect(self, address)
socket.socket.connect = connect_here
"""
# what parts and the tests that they run import, and pytest's plugins; none of the tests, whose assertions it rewrites
AHEAD = ["bench.gpu.command", "transformers.models.llama.modeling_llama", "transformers.models.olmo.modeling_olmo",
    "pytest", "hypothesis", "hydra.extra.pytest_plugin", "anyio.pytest_plugin"]  # fmt: skip


def bare(folder: Path, *lacking: str) -> dict[str, str]:
    """An environment without those packages and a network, for a process and all that it starts."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(lacking=set(lacking)))
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "OMP_NUM_THREADS": "1"}


@contextmanager
def forking_python(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """The script, in `folder`, while the body runs; `environment` is that of the server."""
    with start_server(folder, ("",), AHEAD, environment, code=True) as server:
        try:
            yield folder / "python"
        finally:
            server.kill()
