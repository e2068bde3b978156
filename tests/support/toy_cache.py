"""A toy teacher's cache of several small blocks, for tests of what the cache promises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from microlm.corpus.batches import evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.files import sha256_file, write_json
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of
from microlm.teacher.capture import capture
from microlm.teacher.recorders import Recorder
from tests.support.toy import toy_shards

N_VOCAB, SEQ_LEN, WINDOWS = 70, 16, 20
SHAPE = ModelShape(
    N_VOCAB, 128, layers=1, hidden_size=16, heads=1, head_dim=16, intermediate_size=16, context=32, rope_theta=1e4
)
RUN = {"weights_sha256": "weights", "dtype": "torch.float32"}


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of three windows, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SMALLEST_BLOCK", 3 * SEQ_LEN * 5 * 8)
        yield


@dataclass(frozen=True)
class ToyCache:
    """`whole`: a finished cache, with its manifest. Whoever damages it mends it."""

    model: StudentLM
    shards: TokenShards
    identity: CacheIdentity
    whole: Path

    @classmethod
    def make(cls, directory: Path) -> "ToyCache":
        """To be used inside `small_blocks`."""
        (directory / "corpus").mkdir(parents=True)
        (directory / "whole").mkdir()
        shards = toy_shards(directory / "corpus", N_VOCAB, tokens=900)
        digest, temperatures = shards.digest, (1.0, 2.0)
        identity = CacheIdentity("toy", None, "tokenizer", N_VOCAB, digest, SEQ_LEN, WINDOWS, 5, temperatures, **RUN)
        toy = cls(StudentLM(SHAPE, seed=5).eval(), shards, identity, directory / "whole")
        toy.capture(toy.whole)
        write_json(toy.whole / MANIFEST, toy.manifest(toy.whole))
        for seal in toy.whole.glob("*.seal"):  # of the scratch folder, not of a published cache
            seal.unlink()
        assert len(identity.blocks()) > 4
        return toy

    def capture(
        self, directory: Path, progress: Callable[[int], object] = lambda tokens: None, model: StudentLM | None = None
    ) -> int:
        record = Recorder(model or self.model, self.identity, compiled=False)
        return capture(record, self.shards, evenly_spaced(50, WINDOWS), directory, 2, progress)

    def manifest(self, directory: Path) -> dict[str, object]:
        return manifest_of(self.identity, *RUN.values(), directory)

    def read(self, identity: CacheIdentity | None = None) -> TeacherCache:
        return TeacherCache(self.whole, identity or self.identity, evenly_spaced(50, WINDOWS))


def content(directory: Path) -> dict[str, str]:
    """sha256 of each file, but for those that only tell of another one."""
    files = (path for path in directory.glob("*") if path.is_file() and path.suffix != ".seal")
    return {path.name: sha256_file(path) for path in files}
