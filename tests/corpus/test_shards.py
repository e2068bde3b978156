"""Promises of the shards: what was tokenized is what is read, and damage is found and named."""

import hashlib
import json
import shutil
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.shards import HEADER, MAGIC, VERSION, TokenShards, split_of, token_dtype
from microlm.corpus.sources import documents
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError
from microlm.files import read_json, sha256_file, sha256_json, write_json
from microlm.parameters import CorpusConfig
from tests.support.clones import FIXTURES
from tests.support.packaged import packaged_tokenizer
from tests.support.toy_shards import write_shards

FIXTURE = FIXTURES / "documents.jsonl"
TEXTS = [json.loads(line)["text"] for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
FRACTION = 0.2


@pytest.fixture(scope="module")
def tokenizer(parts: Path) -> Tokenizer:
    return packaged_tokenizer("gpt2", parts)


def write(target: Path, tokenizer: Tokenizer, texts: list[str] = TEXTS, **changes: Any) -> dict[str, Any]:
    options = {"validation_fraction": FRACTION, "shard_tokens": 1500, **changes}
    return write_shards(texts, tokenizer, target, **options)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("data") / "shards"
    write(target, tokenizer)
    return target


def expected(tokenizer: Tokenizer, split: str) -> list[int]:
    chosen = [text for text in TEXTS if split_of(text, FRACTION) == split]
    return [i for text in chosen for i in (tokenizer.eot_id, *tokenizer.encode(text))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_hold_every_document_after_an_end_of_text_token(folder: Path, tokenizer: Tokenizer, split: str) -> None:
    shards = TokenShards(folder, split)
    assert shards.read(0, shards.n_tokens).tolist() == expected(tokenizer, split)
    entry = shards.manifest["splits"][split]
    assert entry["documents"] == sum(split_of(text, FRACTION) == split for text in TEXTS)
    assert entry["text_bytes"] == sum(len(text.encode()) for text in TEXTS if split_of(text, FRACTION) == split)
    assert len(entry["shards"]) > 1 and {shard["tokens"] for shard in entry["shards"][:-1]} == {1500}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_reading_across_shard_borders_equals_one_flat_array(
    folder: Path, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    shards = TokenShards(folder, "train")
    flat = np.array(expected(tokenizer, "train"))
    start = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, min(4000, len(flat) - start)))
    tokens = shards.read(start, length)
    assert tokens.dtype == shards.dtype and tokens.tolist() == flat[start : start + length].tolist()
    width = data.draw(st.integers(1, 1600))
    starts = np.array(data.draw(st.lists(st.integers(0, len(flat) - width), max_size=4)), np.int64)
    windows = shards.windows(starts, width)
    assert windows.dtype == np.int64 and windows.shape == (len(starts), width)
    assert all(row.tolist() == flat[begin : begin + width].tolist() for row, begin in zip(windows, starts, strict=True))


def test_reading_outside_is_an_index_error(folder: Path) -> None:
    shards = TokenShards(folder, "val")
    for start, length in ((-1, 2), (shards.n_tokens, 1), (0, shards.n_tokens + 1), (5, -1)):
        with pytest.raises(IndexError):
            shards.read(start, length)


def test_the_same_corpus_gives_the_same_bytes_whatever_the_workers(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write(tmp_path / "again", tokenizer, workers=3)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(
        str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


# sha256 of manifest.json without its seal, and so of every shard, as one process wrote them when nothing was resumed or
# shared out
GOLDEN = {
    "gpt2": "35267e85293d357cf6120e970b4f87ec0dbbb829456ab04f67e572c01e8a111f",  # the fixture, as at scale smoke
    "smollm2": "01590d7a17a6669fdb7e75a27b3a96f3396dd89d94cd4f32368d3f0ab509eb55",  # 300 packaged documents
}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_are_those_that_were_always_written(parts: Path, tmp_path: Path, name: str, workers: int) -> None:
    packaged = CorpusConfig("packaged", name, validation_fraction=0.04, train_tokens=None, shard_tokens=8192)
    texts, fraction = (TEXTS, 0.1) if name == "gpt2" else (list(islice(documents(packaged, parts), 300)), 0.04)
    options = {"validation_fraction": fraction, "shard_tokens": 8192, "workers": workers}
    write(tmp_path / "shards", packaged_tokenizer(name, parts), texts, **options)
    manifest = read_json(tmp_path / "shards" / "manifest.json", "tokenize")
    del manifest["sha256"]
    write_json(tmp_path / "unsealed.json", manifest)
    assert sha256_file(tmp_path / "unsealed.json") == GOLDEN[name]
    for split in ("train", "val"):
        TokenShards(tmp_path / "shards", split)  # holds every file against the manifest


def test_copies_of_a_document_fall_into_one_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "shards", tokenizer, [*TEXTS, *reversed(TEXTS)])
    documents = {}
    for split in ("train", "val"):
        shards = TokenShards(tmp_path / "shards", split)
        tokens = shards.read(0, shards.n_tokens)
        borders = [*np.flatnonzero(tokens == tokenizer.eot_id), len(tokens)]
        documents[split] = {tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(borders)}
    assert not documents["train"] & documents["val"]
    assert documents["train"] | documents["val"] == set(TEXTS)


@settings(max_examples=50)
@given(text=st.text(), small=st.floats(0.01, 0.5))
def test_a_larger_validation_fraction_only_adds_documents(text: str, small: float) -> None:
    assert split_of(text, small) == "train" or split_of(text, small + 0.2) == "val"


def test_the_share_of_validation_documents_is_what_was_asked() -> None:
    share = np.mean([split_of(f"document {i}", 0.1) == "val" for i in range(5000)])
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 5000) ** 0.5


def test_training_tokens_stop_at_the_limit_exactly(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", tokenizer, train_tokens=4001)
    shards = TokenShards(tmp_path / "shards", "train")
    assert shards.n_tokens == manifest["splits"]["train"]["tokens"] == 4001
    assert np.array_equal(shards.read(0, 4001), TokenShards(folder, "train").read(0, 4001))
    decoded = tokenizer.byte_lengths[shards.read(0, 4001)].sum()
    assert manifest["splits"]["train"]["text_bytes"] == decoded


def test_reading_stops_soon_after_the_limit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def endless() -> Any:
        number = 0
        while True:
            yield f"Document {number} of a corpus without end."
            number += 1

    manifest = write(tmp_path / "shards", tokenizer, endless(), train_tokens=3000)
    assert manifest["splits"]["train"]["tokens"] == 3000


def test_ids_above_sixteen_bits_are_stored_in_thirty_two() -> None:
    assert token_dtype(50257) == np.uint16 and token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_the_header_and_the_manifest_say_what_the_file_holds(folder: Path, tokenizer: Tokenizer) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            content = (folder / shard["file"]).read_bytes()
            assert HEADER.size == 256 and HEADER.unpack(content[:256]) == (MAGIC, VERSION, 2, shard["tokens"])
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert split["digest"] == sha256_json([shard["sha256"] for shard in split["shards"]])
    assert manifest["tokenizer"] == {
        "name": "gpt2",
        "fingerprint": tokenizer.fingerprint,
        "n_vocab": 50257,
        "eot_id": 50256,
    }
    assert load_tokenizer(folder / "tokenizer").fingerprint == tokenizer.fingerprint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def flip_token(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def flip_magic(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "bytes long, expected"),
        (lengthen, "bytes long, expected"),
        (flip_token, "sha256"),
        (flip_magic, "header"),
        (Path.unlink, "not there"),
    ],
)
def test_a_damaged_shard_is_named_with_the_check_that_failed(
    folder: Path, tmp_path: Path, damage: Any, complaint: str
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    damage(tmp_path / "shards" / "train-00001.bin")
    with pytest.raises(UserError, match=rf"train-00001\.bin.*{complaint}.*dvc repro") as caught:
        TokenShards(tmp_path / "shards", "train")
    assert "\n" not in str(caught.value)
    TokenShards(tmp_path / "shards", "val")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "microlm-shards", "version": 99}'])
def test_a_damaged_manifest_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        TokenShards(tmp_path / "shards", "train")


def test_an_absent_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make it with: dvc repro tokenize"):
        TokenShards(tmp_path, "train")


@pytest.mark.parametrize("texts", [TEXTS[:1], []])
def test_a_split_without_documents_is_an_error_and_the_old_shards_stay(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, texts: list[str]
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    with pytest.raises(UserError, match=r"change corpus\.validation_fraction"):
        write(tmp_path / "shards", tokenizer, texts)
    assert (tmp_path / "shards/manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_windows_do_not_write_to_the_shards(folder: Path) -> None:
    shards = TokenShards(folder, "train")
    shards.read(0, 10)[:] = 0
    assert TokenShards(folder, "train").read(0, 1)[0] != 0
