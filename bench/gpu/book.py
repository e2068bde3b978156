"""The file that a run writes: every figure the moment it is known, so that a run that is cut has lost none."""

import json
import math
import time
from pathlib import Path
from typing import Any

from microlm.errors import UserError
from microlm.files import write_json

FORMAT, VERSION = "microlm-gpu-figures", 1
STARTED, MEASURED, FAILED, CUT, NOT_RUN = "started", "measured", "failed", "cut short", "not run: no time left"


class Book:
    """Parts by name, each with its figures by key.

    A part that runs again replaces a figure when it has the new one, and drops what it no longer measures when it ends.
    """

    def __init__(self, path: Path) -> None:
        """UserError where the file is there and is not a run's."""
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "parts": {}}
        if path.exists():
            self.content = _read(path)

    def about(self, facts: dict[str, Any]) -> None:
        """Of the machine, or a figure that others read: at the top level."""
        self.content |= facts
        self._write()

    def start(self, name: str) -> None:
        """A part begins; should it be cut, this is what stands."""
        part = self.content["parts"].setdefault(name, {"figures": {}})
        part |= {"status": STARTED, "at": time.strftime("%Y-%m-%d %H:%M:%S"), "fresh": []}
        part.pop("error", None)
        self._write()

    def note(self, name: str, key: str, figures: dict[str, Any]) -> None:
        """Figures of a part. ValueError where one is not finite."""
        part = self.content["parts"][name]
        for figure, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: {key}: {figure} is {value}")
        part["figures"][key] = figures
        part["fresh"].append(key)
        self._write()

    def finish(self, name: str, seconds: float) -> None:
        part = self.content["parts"][name]
        part["figures"] = {key: part["figures"][key] for key in part.pop("fresh")}
        self._end(name, MEASURED, seconds=round(seconds, 1))

    def fail(self, name: str, error: str, status: str = FAILED) -> None:
        """One line of why; figures that were noted stay, and so do older ones."""
        self._end(name, status, error=error)

    def not_run(self, name: str, estimate_s: float) -> None:
        """Where it was measured before, that stands."""
        if self.status(name) != MEASURED:
            self.content["parts"].setdefault(name, {"figures": {}})
            self._end(name, NOT_RUN, estimate_s=estimate_s)

    def status(self, name: str) -> str | None:
        return self.content["parts"].get(name, {}).get("status")

    def figures(self, name: str) -> dict[str, dict[str, Any]]:
        """What is known of a part by now, whichever run measured it."""
        return self.content["parts"].get(name, {}).get("figures", {})

    def reload(self) -> None:
        """Take over what another process has written."""
        self.content = _read(self.path)

    def _end(self, name: str, status: str, **told: Any) -> None:
        part = self.content["parts"][name]
        for stale in ("fresh", "error", "estimate_s"):
            part.pop(stale, None)
        part |= {"status": status, **told}
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)


def _read(path: Path) -> dict[str, Any]:
    mend = "remove it, or name another with --file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); {mend}") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path}: not {FORMAT} version {VERSION}; {mend}")
    return content
