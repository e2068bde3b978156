"""Where tests marked `cuda` run: on a CUDA device; or, to know that they run at all, on the CPU.

python -m pytest -m cuda                                    # on a machine with a device
MICROLM_CUDA_TESTS_ON=cpu python -m pytest -m cuda          # the same bodies, as far as a CPU can take them
MICROLM_SOAK=1 MICROLM_CUDA_TESTS_ON=cpu python -m pytest -m cuda   # of `cases` all, and what is compiled
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from microlm.objective.vocabulary_blocks import SIZES
from microlm.runtime import compilation
from tests.support.soak import SOAKING

ON = os.environ.get("MICROLM_CUDA_TESTS_ON", "cuda")
DEVICE = torch.device(ON)
# a CPU takes minutes to compile what a card's compiler has in seconds
COMPILES = pytest.mark.skipif(ON == "cpu" and not SOAKING, reason="minutes on a CPU: set MICROLM_SOAK=1")
NEEDS_CUDA = pytest.mark.skipif(ON == "cpu", reason="says nothing on a CPU")
ONE_IN = 11  # of the cases on a CPU; prime to the number of each parameter's values, so that they come in turns


def cases(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """For `parametrize`, every combination of the parameters' values; on a CPU a sample of them, but for a soak."""
    return list(itertools.product(*values)) if ON != "cpu" or SOAKING else sample(*values)


def sample(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few of the combinations. What two parameters do to each other is still in it: any two of their values meet."""
    return list(itertools.product(*values))[::ONE_IN]


@pytest.fixture
def device() -> torch.device:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return DEVICE


@contextmanager
def sizes_of_cuda(**changed: int) -> Iterator[None]:
    """The head's logits held as on CUDA, wherever this runs, but for what is `changed`."""
    with patch.dict(SIZES, {DEVICE.type: replace(SIZES["cuda"], **changed)}):
        yield


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """The head's passes compiled for the body, as `runtime.set_up` does for good."""
    with patch.object(compilation, "enabled", True):
        yield
