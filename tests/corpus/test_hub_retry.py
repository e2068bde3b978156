"""Promises of the requests to the hub: what may pass is outlasted and told, what may not comes back at once."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from microlm.corpus.hub import RetryingClient
from microlm.errors import UserError
from tests.support.hub_server import REVISION, Fault, Hub, serving

CONTENT = bytes(range(256)) * 100
PATH = f"/datasets/a/b/resolve/{REVISION}/x.parquet"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path) as hub:
        (hub.repository("datasets", "a/b") / "x.parquet").write_bytes(CONTENT)
        yield hub


def get(
    hub: Hub, waits_s: tuple[float, ...] = (0.01, 0.02, 0.03), path: str = PATH, timeout_s: float = 60
) -> httpx2.Response:
    with RetryingClient(waits_s=waits_s, timeout=timeout_s, trust_env=False) as client:
        return client.get(hub.url + path, headers={"Range": "bytes=100-20099"})


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("reset", "reset by peer"),
        ("429", "HTTP status 429"),
        ("503", "HTTP status 503"),
        ("stall", "the read stalled"),
        ("truncate", "without sending complete message body"),
        ("shorten", "10000 bytes of a range of 20000"),
    ],
)
def test_a_passing_fault_is_outlasted_and_told_in_a_line(
    hub: Hub, capsys: pytest.CaptureFixture[str], kind: str, told: str
) -> None:
    hub.faults = [Fault(kind, times=2 if kind != "stall" else 1)]
    assert get(hub, timeout_s=1 if kind == "stall" else 60).content == CONTENT[100:20100]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(hub.requests) - 1 >= hub.faults[0].times
    assert told in lines[0] and lines[0].startswith("hub: 127.0.0.1/datasets/a/b/") and "try 2 of 4 in" in lines[0]


def test_a_fault_that_stays_is_an_error_after_the_last_try(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults = [Fault("503", times=1000)]
    with pytest.raises(
        UserError, match=r"HTTP status 503, the last of 4 tries; .* run the same command again"
    ) as caught:
        get(hub)
    assert "\n" not in str(caught.value) and len(hub.requests) == 4
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_server_says_when_to_come_back(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults = [Fault("429")]  # with Retry-After: 0
    assert get(hub, waits_s=(3600,)).status_code == 206
    assert "try 2 of 2 in 0 s" in capsys.readouterr().err


def test_what_will_not_pass_comes_back_at_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for number, kind in enumerate(("401", "403"), start=1):
        hub.faults = [Fault(kind)]
        assert get(hub).status_code == int(kind) and len(hub.requests) == number
    assert get(hub, path=PATH.replace("x.", "y.")).status_code == 404
    assert len(hub.requests) == 3 and not capsys.readouterr().err


def test_a_hub_that_nobody_answers_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path) as closed:
        pass
    with pytest.raises(UserError, match="refused, the last of 2 tries") as caught:
        get(closed, waits_s=(0.01,))
    assert "\n" not in str(caught.value) and len(capsys.readouterr().err.splitlines()) == 1
