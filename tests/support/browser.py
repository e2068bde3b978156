"""A real Chromium without a window, spoken to over its own DevTools protocol through a pipe: no driver, no port.

Messages are JSON, each ended by a NUL byte; the browser reads them from its file descriptor 3 and answers on 4
(https://chromedevtools.github.io/devtools-protocol/).
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
]
PATIENCE_S = 120  # of a busy machine; what is waited for takes milliseconds


def chromium() -> str:
    """The program. Skips where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here; on Debian or Ubuntu: apt-get install chromium")
    return found


class Browser:
    """One tab. `events` holds all that the browser reported of it, in order."""

    def __init__(self, to: int, out: int) -> None:
        self._to, self._out, self._buffer, self._id, self._session = to, out, b"", 0, {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        """The next message, kept among the events if it is one."""
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(0, deadline - time.monotonic()))
            read = os.read(self._out, 1 << 20) if ready else b""
            assert read, "Chromium does not answer"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def reported(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def show(self, width: int, height: int = 900, media: str = "", dark: bool = False, phone: bool = False) -> None:
        """The size of the tab and what the page is told of its surroundings."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, page: Path, scripts: bool = True) -> None:
        """Load a file and wait until its scripts, if they run, say that they have drawn."""
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not self.reported("Page.loadEventFired"):
            self._next()
        if scripts:
            self.wait("'drawn' in document.documentElement.dataset")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never true: {condition}\n{self.events[-5:]}"
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, a promise's once it is there."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        shot = self.ask("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._session = {}
        self.ask("Browser.close")

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an own, fresh profile; it has ended afterwards."""
    reads, to = os.pipe()
    out, writes = os.pipe()
    # out of the way of 3 and 4, which the child's ends become
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (reads, writes)]
    os.close(reads), os.close(writes)

    def pipe_ends() -> None:
        os.dup2(theirs[0], 3), os.dup2(theirs[1], 4)

    command = [chromium(), *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, preexec_fn=pipe_ends, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    for end in theirs:
        os.close(end)
    try:
        opened = Browser(to, out)
        yield opened
        opened.close()
        process.wait(PATIENCE_S)
    finally:
        os.close(to), os.close(out)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its helpers too, which would write into the profile for a while
        process.wait(PATIENCE_S)
