"""How long the tests of survival are: a sample in `make test`, as many as docs/reliability.md tells in `make soak`."""

import os
from collections import Counter

import pytest

SURVIVED: Counter[str] = Counter()  # what was done and survived, by kind; told at the end of a soak
SOAKING = bool(os.environ.get("MICROLM_SOAK"))
LONG = pytest.mark.skipif(not SOAKING, reason="minutes: set MICROLM_SOAK=1, or make soak")


def times(sample: int, soak: int, variable: str) -> int:
    """How often to do something: `variable` of the environment where it is set, else by the kind of run."""
    return int(os.environ.get(variable, soak if SOAKING else sample))
