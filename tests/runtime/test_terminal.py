"""What waits says so on a terminal and nowhere else, and a bar there has a time to go."""

import os
import pty
import sys
import termios
import time

import pytest

from microlm.runtime.terminal import progress_bar, waiting


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, body) -> str:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        body()
    os.set_blocking(ours, False)
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:  # what was written is read
        pass
    os.close(ours)
    return said.decode()


def test_a_wait_without_an_end_in_sight_is_told_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        with waiting("start: reading it\x1b[2J"):
            time.sleep(1.2)

    said = shown_on_a_terminal(monkeypatch, body)
    assert "start: reading it" in said and "... 00:01" in said and "\x1b[2J" not in said
    assert said.rstrip("\r").endswith(" ") or said.endswith("\r")  # the line was blanked


def test_a_wait_says_nothing_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("start: reading it"):
        pass
    assert capsys.readouterr() == ("", "")


def test_an_error_in_a_wait_is_the_bodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        with pytest.raises(KeyError), waiting("start"):
            raise KeyError("mine")

    shown_on_a_terminal(monkeypatch, body)


def test_a_bar_has_a_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        with progress_bar(4, 0, "window", "scores") as bar:
            time.sleep(0.3)
            bar.update(2)
            time.sleep(0.3)
            bar.update(1)

    assert "scores" in (said := shown_on_a_terminal(monkeypatch, body)) and "00:00<00:00" in said.replace(" ", "")
