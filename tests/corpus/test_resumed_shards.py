"""Promises of a tokenization: one that was stopped goes on from its last finished shard, to the same bytes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microlm.corpus.sources import Documents, Position
from microlm.corpus.tokenizer import AWKWARD_TEXTS, Tokenizer
from microlm.corpus.writing import Encoded, ShardWriter, encoded
from microlm.errors import UserError
from tests.support.clones import FIXTURES, ROOT
from tests.support.other_tokenizers import first_merges
from tests.support.packaged import packaged_tokenizer
from tests.support.toy_shards import batches_of

FIXTURE = FIXTURES / "documents.jsonl"
TEXTS = [json.loads(line)["text"] for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
SHARD_TOKENS, LIMIT = 1500, 6100


@pytest.fixture(scope="module")
def tokenizer(parts: Path) -> Tokenizer:
    """Of few tokens: it is published beside the shards, in every example."""
    return first_merges(packaged_tokenizer("gpt2", parts), 10_000)


@pytest.fixture(scope="module")
def batches(tokenizer: Tokenizer) -> list[tuple[list[Encoded], Position]]:
    """Of seven documents: a shard ends in the middle of some, none ends in others."""
    small = [Documents(TEXTS[i : i + 7], Position(0, min(i + 7, len(TEXTS)))) for i in range(0, len(TEXTS), 7)]
    return list(encoded(small, tokenizer, 0.2, workers=1))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[None, LIMIT], ids=["all", "limited"])
def whole(
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
    batches: list[tuple[list[Encoded], Position]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int | None, dict[str, bytes]]:
    """The limit of the training split, and the files of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    writer = ShardWriter(folder, tokenizer, SHARD_TOKENS, request.param)
    writer.write(batches)
    writer.publish(folder / "target", {})
    return request.param, files_of(folder / "target")


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(stops=st.lists(st.integers(1, 12), max_size=4), junk=st.binary(max_size=50))
def test_runs_stopped_anywhere_end_in_the_same_bytes(
    tokenizer: Tokenizer,
    batches: list[tuple[list[Encoded], Position]],
    whole: tuple[int | None, dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
    junk: bytes,
) -> None:
    limit, expected = whole
    folder = tmp_path_factory.mktemp("stopped")
    for stop in stops:
        writer = ShardWriter(folder, tokenizer, SHARD_TOKENS, limit)
        writer.write(rest_of(batches, writer.position)[:stop])
        del writer  # and with it what it had not yet handed to the system
        for path in (folder / "shards").iterdir():  # what was on its way to the disk when the run was stopped
            if path.name not in finished(folder):
                with open(path, "ab") as file:
                    file.write(junk)
    writer = ShardWriter(folder, tokenizer, SHARD_TOKENS, limit)
    writer.write(rest_of(batches, writer.position))
    writer.publish(folder / "target", {})
    assert files_of(folder / "target") == expected


def rest_of(batches: list[tuple[list[Encoded], Position]], position: Position) -> list[tuple[list[Encoded], Position]]:
    return [batch for batch in batches if batch[1].row > position.row]


def finished(folder: Path) -> set[str]:
    """Names of the shards that the progress counts as finished."""
    path = folder / "progress.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    return {shard["file"] for split in ("train", "val") for shard in state.get(split, {}).get("shards", [])}


def test_a_second_run_has_little_left_to_do(
    tokenizer: Tokenizer, batches: list[tuple[list[Encoded], Position]], tmp_path: Path
) -> None:
    writer = ShardWriter(tmp_path, tokenizer, SHARD_TOKENS)
    writer.write(batches)
    again = ShardWriter(tmp_path, tokenizer, SHARD_TOKENS)
    assert writer.counts()[1] - again.counts()[1] < 2 * SHARD_TOKENS
    assert finished(tmp_path) == {path.name for path in (tmp_path / "shards").iterdir()} - {
        max(path.name for path in (tmp_path / "shards").glob(f"{split}-*")) for split in ("train", "val")
    }


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_in_an_interrupted_run_is_named_before_anything_is_built_on_it(
    tokenizer: Tokenizer, batches: list[tuple[list[Encoded], Position]], tmp_path: Path, which: str, damage: str
) -> None:
    ShardWriter(tmp_path, tokenizer, SHARD_TOKENS).write(batches)
    shards = sorted((tmp_path / "shards").glob("train-*"))
    path = shards[0] if which == "first" else shards[-1]
    content = bytearray(path.read_bytes())
    content[300 if which == "first" else 258] ^= 1
    {
        "flip": lambda: path.write_bytes(content),
        "truncate": lambda: os.truncate(path, 200),
        "remove": path.unlink,
    }[damage]()
    with pytest.raises(UserError, match=rf"{path.name} .*; remove that folder to start over") as caught:
        ShardWriter(tmp_path, tokenizer, SHARD_TOKENS)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_tokenizer_sent_to_another_process_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    tokenizer.check(AWKWARD_TEXTS)  # makes the reference, which a copy must not lose a setting of
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert [copy.encode(text) for text in AWKWARD_TEXTS] == [tokenizer.encode(text) for text in AWKWARD_TEXTS]
    copy.check(AWKWARD_TEXTS)


def test_an_error_of_the_source_ends_the_workers_and_comes_through(tokenizer: Tokenizer) -> None:
    def broken() -> object:
        yield from batches_of(TEXTS)
        raise UserError("the source has ended")

    with pytest.raises(UserError, match="the source has ended"):
        list(encoded(broken(), tokenizer, 0.2, workers=2))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


ENDLESS = """
import itertools, os, sys
from pathlib import Path
from microlm.corpus.sources import Documents, Position
from microlm.corpus.tokenizer import json_tokenizer
from microlm.corpus.writing import encoded

if __name__ == "__main__":
    endless = (Documents(["a text"], Position(0, i)) for i in itertools.count(1))
    for _ in encoded(endless, json_tokenizer(Path(sys.argv[1])), 0.2, workers=2):
        print("started", flush=True)
"""


def test_workers_end_with_a_killed_parent(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(tmp_path / "tokenizer.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
