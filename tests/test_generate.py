"""Promises of `microlm generate`: what is shown is what is written, as it is written; a mistake is one line."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microlm.commands import generate
from microlm.errors import plain
from tests.support.forked_python import forked_python
from tests.support.tiny_candidates import OFFLINE, Said, microlm, repository, save_tiny_student
from tests.test_cli import told

PROMPT = "The city of Rome"
BOTH = ("models/student", "models/llama")
INTERRUPTED = b"error: interrupted; nothing is left half-written; run the same command again to go on\n"


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def asked(*arguments: object, models: tuple[str, ...] = BOTH[:1]) -> Said:
    said = microlm("generate", *models, "--max-new-tokens", "12", *arguments)
    assert said.code == 0, said.err
    return said


def rows(*arguments: object, models: tuple[str, ...] = BOTH[:1]) -> list[dict[str, object]]:
    return [json.loads(line) for line in asked("--json", *arguments, models=models).out.splitlines()]


def test_models_write_one_under_another_and_json_holds_the_same() -> None:
    prompts = ("--prompt", PROMPT, "--prompt", "1.\n2.\t")
    said, found = asked(*prompts, models=BOTH), rows(*prompts, models=BOTH)
    assert [(row["model"], row["prompt"]) for row in found] == [
        (model, prompt) for prompt in prompts[1::2] for model in BOTH
    ]
    shown = ""
    for row in found:
        text = "\t".join(map(plain, f"{row['prompt']}{row['continuation']}".split("\t")))
        assert row["tokens"] == 12 and not row["ended"]
        shown += f"{row['model']}\n{text}\n(12 tokens)\n\n"
    assert said.out == shown and said.err == ""
    assert len({row["continuation"] for row in found}) == 4


def test_a_seed_draws_and_draws_the_same_again() -> None:
    greedy, one, again, other, hot = (
        rows("--prompt", PROMPT, *more)[0]["continuation"]
        for more in ([], ["--seed", "1"], ["--seed", "1", "--do-sample"], ["--seed", "2"], ["--temperature", "3"])
    )
    assert one == again and len({greedy, one, other, hot}) == 4
    assert rows("--prompt", PROMPT, "--top-k", "1", "--seed", "5")[0]["continuation"] == greedy
    assert rows("--prompt", PROMPT, "--do-sample")[0] == rows("--prompt", PROMPT, "--seed", "0")[0]


def test_a_text_does_not_depend_on_what_was_written_before() -> None:
    drawn = rows("--prompt", "A", "--prompt", PROMPT, "--seed", "3", models=BOTH)
    (alone,) = rows("--prompt", PROMPT, "--seed", "3", models=BOTH[1:])
    assert drawn[3] == alone


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_prompt_comes_from_stdin_without_the_lines_end(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"naïve\nRome{end}".encode()), encoding="ascii"))
    assert rows("--prompt", "-") == rows("--prompt", "naïve\nRome")


def test_nothing_before_a_prompt_is_needed_where_a_text_begins_by_itself() -> None:
    assert rows("--prompt", "")[0]["tokens"] == 12


def test_an_end_and_a_lack_of_room_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_student(Path("tight"), context=12)
    said = asked("--prompt", PROMPT, models=("tight",))
    assert re.search(r"\n\(\d tokens: no position is left\)\n\n$", said.out)


MISTAKES = [
    (["models/student"], r"required: --prompt"),
    (["models/student", "./models/student/", "--prompt", "a"], r"MODEL: models/student is named twice"),
    (["models/student", "./models/nothing", "--prompt", "a"], r"\./models/nothing: is no model directory"),
    (["models/llama", "--prompt", "a", "--prompt", ""], r"--prompt: is empty, and nothing begins .*models/llama"),
    (["models/student", "--prompt", "word " * 300], r"--prompt: takes \d+ tokens of models/student, which has 256"),
    (["models/student", "--prompt", "caf\udce9"], r"--prompt: is not UTF-8 from character 3 on"),
    (["models/student", "--prompt", "-", "--prompt", "-"], r"--prompt: - is given twice"),
    (["models/student", "--prompt", "a", "--max-new-tokens", "0"], r"--max-new-tokens: 0 is less than 1"),
    (
        ["models/student", "--prompt", "a", "--temperature", "0"],
        r"--temperature: 0\.0 is not a number above 0; for the",
    ),
    (["models/student", "--prompt", "a", "--temperature", "nan"], r"--temperature: nan is not a number above 0"),
    (["models/student", "--prompt", "a", "--temperature", "hot"], r"--temperature: invalid float value: 'hot'"),
    (["models/student", "--prompt", "a", "--top-k", "0"], r"--top-k: 0 is less than 1"),
    (["models/student", "--prompt", "a", "--top-p", "1.5"], r"--top-p: 1\.5 is no probability above 0"),
    (["models/student", "--prompt", "a", "--seed", "-1"], r"--seed: -1 is not between 0 and 4294967295"),
    (["models/student", "--prompt", "a", "--seed", str(2**32)], r"--seed: 4294967296 is not between"),
    (["models/student", "--prompt", "a", "--repetition-penalty", "inf"], r"--repetition-penalty: inf is not a number"),
    (["models/student", "--prompt", "a", "--beams", "3"], r"--beams.*--help"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[line for _, line in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(arguments: list[str], line: str) -> None:
    said = microlm("generate", *arguments)
    assert re.search(line, told(said)) and said.out == ""


def test_stdin_that_is_no_utf_8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait")))
    assert "--prompt: is not UTF-8 from character 3 on" in told(microlm("generate", "models/student", "--prompt", "-"))


# so much that a machine that is slow to signal or to close is still in time
LONG = ("generate", "models/student", *("--prompt", PROMPT) * 100, "--max-new-tokens", "240")


def process(*arguments: str, **streams: Any) -> subprocess.Popen[Any]:
    """The command in a process of its own, whose imports are done."""
    environment = os.environ | OFFLINE | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    asked = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | streams
    return subprocess.Popen([forked_python(), "-m", "microlm", *arguments], **asked)


def test_ctrl_c_ends_a_line_and_says_so() -> None:
    running, heading = process(*LONG), f"models/student\n{PROMPT}".encode()
    begun = running.stdout.read(len(heading) + 1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert begun.startswith(heading) and out.endswith(b"\n") and b"tokens)" not in out
    assert (running.returncode, err) == (130, INTERRUPTED)


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    running = process(*LONG)
    running.stdout.read(20)
    running.stdout.close()
    assert (running.wait(), running.stderr.read()) == (141, b"")


@pytest.mark.parametrize(("width", "models", "fits"), [(100, 2, True), (70, 2, False), (200, 1, False), (119, 3, True)])
def test_columns_are_drawn_where_each_is_wide_enough_to_read(
    width: int, models: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    with open(terminal, "w") as out, open(controller, "rb"):
        monkeypatch.setattr(sys, "stdout", out)
        assert generate._fit(models) == fits
        monkeypatch.setenv("TERM", "dumb")
        assert not generate._fit(models)
        monkeypatch.undo()


def test_a_wide_terminal_shows_models_side_by_side() -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
    asking = ["generate", *BOTH, "--prompt", PROMPT, "--max-new-tokens", "20"]
    running = process(*asking, stdout=terminal)
    os.close(terminal)
    drawn = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        drawn += piece
    os.close(controller)
    assert running.wait() == 0, running.stderr.read()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode().replace("\r", "")).split("models/student")
    assert len(frames) > 20  # drawn again for each piece
    lines = f"models/student{frames[-1]}".splitlines()
    assert "models/llama" in lines[0]
    middle = lines[0].index("models/llama")
    for column, row in zip((slice(0, middle), slice(middle, None)), rows_of_twenty()):
        shown = "".join("".join(line[column].split()) for line in lines[1:])
        assert shown == "".join(f"{PROMPT}{plain(row['continuation'])}(20 tokens)".split())


def rows_of_twenty() -> list[dict[str, str]]:
    said = microlm("generate", *BOTH, "--prompt", PROMPT, "--max-new-tokens", "20", "--json")
    return [json.loads(line) for line in said.out.splitlines()]
