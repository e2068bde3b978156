"""Write, then rename: a reader sees the old file or the new one, and a person sees one line."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microlm.errors import UserError, run_stage
from microlm.files import atomic_directory, atomic_file, read_json, sha256_bytes, sha256_file, sha256_json, write_json
from tests.support.clones import ROOT

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def python(code: str, directory: Path, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter; files it writes may have at most `limit_bytes`."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=limit if limit_bytes is not None else None,
    )


@FUZZ
@given(old=st.binary(max_size=64), new=st.binary(max_size=64))
def test_file_is_replaced_whole(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as file:
        file.write(old)
    with atomic_file(path) as file:
        file.write(new)
        file.flush()
        assert path.read_bytes() == old
    assert path.read_bytes() == new
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError, SystemExit])
def test_failure_inside_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), atomic_file(path, "w") as file:
        file.write("new")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_inside_leaves_the_old_directory(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as directory:
        (directory / "weights").write_text("old")
    with pytest.raises(failure), atomic_directory(path) as directory:
        (directory / "weights").write_text("new")
        (directory / "more").write_text("new")
        raise failure
    assert names(path) == ["weights"]
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as directory:
        (directory / "only-old").write_text("old")
        assert not path.exists()
    with atomic_directory(path) as directory:
        (directory / "nested").mkdir()
        (directory / "nested" / "only-new").write_text("new")
        assert names(path) == ["only-old"]
    assert names(path) == ["nested"]
    assert names(tmp_path) == ["model"]


def test_lines_keep_their_endings(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file", "w") as file:
        file.write("é\n")
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n"


def test_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sizes = {200_000, 300_000}
    writer = (
        "from microlm.files import atomic_file\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for byte, size in ((b'a', 200_000), (b'b', 300_000)):\n"
        "        with atomic_file('file') as file:\n"
        "            for _ in range(10): file.write(byte * (size // 10))\n"
    )
    path.write_bytes(b"a" * 200_000)
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", writer],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) in sizes
        assert len(set(content)) == 1
    with atomic_file(path) as file:  # what a killed writer left beside it is in nobody's way
        file.write(b"c")
    assert path.read_bytes() == b"c"


FILL_THE_DISK = """
from microlm.errors import run_stage
from microlm.files import atomic_file
def main():
    with atomic_file("models.bin") as file:
        file.write(b"x" * 1_000_000)
run_stage(main)
"""


def test_file_over_the_size_limit_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "models.bin").write_text("old")
    ended = python(FILL_THE_DISK, tmp_path, limit_bytes=4096)
    assert ended.returncode != 0
    assert (tmp_path / "models.bin").read_text() == "old"
    assert names(tmp_path) == ["models.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_full_disk_is_one_line(tmp_path: Path) -> None:
    code = "from microlm.errors import run_stage\nrun_stage(lambda: open('/dev/full', 'w', buffering=1).write('x\\n'))"
    ended = python(code, tmp_path)
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert line.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in line
    assert "make room" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_disk_trouble_names_the_file(capsys: pytest.CaptureFixture[str], number: int) -> None:
    def stage() -> None:
        raise OSError(number, os.strerror(number), "data/shards/train-00000.bin")

    with pytest.raises(SystemExit) as ended:
        run_stage(stage)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith(f"error: data/shards/train-00000.bin: {os.strerror(number)}")


def test_a_disk_that_fills_under_safetensors_is_one_line(tmp_path: Path) -> None:
    """Its writer is not Python's: the number of the error reaches us as text."""
    program = (
        "import resource, signal, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from microlm.errors import run_stage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "run_stage(lambda: save_file({'w': torch.zeros(100_000)}, sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.safetensors")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and "File too large" in ended.stderr and ended.stderr.count("\n") == 1


def test_each_mistake_is_a_line_and_the_status_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        raise UserError("params.yaml: alpha: first\nparams.yaml: seed: second")

    with pytest.raises(SystemExit) as ended:
        run_stage(stage)
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: params.yaml: alpha: first",
        "error: params.yaml: seed: second",
    ]


def test_interrupt_is_a_line_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_stage(stage)
    assert ended.value.code not in (0, None)
    assert capsys.readouterr().err.splitlines() == [
        "error: interrupted; nothing is left half-written; run the same command again to go on"
    ]


@pytest.mark.parametrize("defect", [ValueError("ours"), OSError(errno.EIO, "input/output error")])
def test_defect_of_ours_keeps_its_traceback(defect: Exception) -> None:
    def stage() -> None:
        raise defect

    with pytest.raises(type(defect)):
        run_stage(stage)


@FUZZ
@given(value=st.dictionaries(st.text(), json_values, max_size=4))
def test_json_arrives_as_it_was_written(tmp_path: Path, value: dict[str, object]) -> None:
    write_json(tmp_path / "metrics.json", value)
    assert read_json(tmp_path / "metrics.json", made_by="pretrain") == value


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_without_a_number_is_never_written(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "metrics.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss": number})
    assert read_json(tmp_path / "metrics.json", made_by="pretrain") == {"loss": 1.0}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b"3"])
def test_damaged_json_names_the_file_and_the_stage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, made_by="tokenize")
    [line] = str(caught.value).splitlines()
    assert str(path) in line
    assert "dvc repro -f -s tokenize" in line


def test_absent_json_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro teacher"):
        read_json(tmp_path / "manifest.json", made_by="teacher")


@FUZZ
@given(value=st.dictionaries(st.text(), json_values, min_size=2, max_size=5))
def test_json_hash_is_blind_to_the_order_of_keys_alone(value: dict[str, object]) -> None:
    assert sha256_json(dict(reversed(value.items()))) == sha256_json(value)
    assert sha256_json({**value, "another key of this test": 1}) != sha256_json(value)


def test_file_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content)


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_traceback(tmp_path: Path) -> None:
    code = """
from microlm.errors import run_stage
def main():
    for i in range(200_000):
        print("line", i)
run_stage(main)
"""
    ended = subprocess.run(
        f"{sys.executable} -c '{code}' | head -1",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ended.stdout, ended.stderr) == ("line 0\n", "")
