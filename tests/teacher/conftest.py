"""What tests of the teacher's cache share."""

from collections.abc import Iterator

import pytest

from tests.support.toy_cache import ToyCache, small_blocks


@pytest.fixture(scope="module")
def several_blocks() -> Iterator[None]:
    with small_blocks():
        yield


@pytest.fixture(scope="module")
def toy(several_blocks: None, tmp_path_factory: pytest.TempPathFactory) -> ToyCache:
    return ToyCache.make(tmp_path_factory.mktemp("toy"))
