"""The hub: a dataset that is not there is refused in a line; HTTP outlasts bad minutes, and each try is told in one."""

import os
import sys
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import httpx2
from huggingface_hub import HfApi, constants, get_session, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers
from tqdm import tqdm

from microlm.errors import UserError
from microlm.parameters import CorpusConfig

LOG_IN = "log in (hf auth login, or HF_TOKEN)"
WAITS_S = (1, 2, 4, 8, 16, 32, 60, 60, 60)  # before each new try: four minutes in all
LONGEST_WAIT_S = 300  # the hub counts requests in windows of five minutes
PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)


def retry_requests() -> None:
    """Have huggingface_hub, and `datasets` over it, send every request of this process through a RetryingClient."""
    hooks = get_session().event_hooks
    # the timeout is for the requests that name none: without one, a silent server is waited for without end
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    set_client_factory(lambda: RetryingClient(event_hooks=hooks, follow_redirects=True, timeout=timeout))


def refuse_absent(config: CorpusConfig, key: str) -> None:
    """UserError where the hub refuses for good (no such dataset or revision, no access) or is out of reach for minutes.

    Args:
        key: of params.yaml, that names the dataset.
    """
    try:
        HfApi().dataset_info(config.dataset, revision=config.revision)
        return
    except GatedRepoError:
        mend = f"accept its terms on the dataset's page, then {LOG_IN}"
        told = f"gives this dataset only to who has accepted its terms; {mend}"
    except RevisionNotFoundError:
        told = f"has the dataset, but no such revision; set {key}.revision to the full hash of one of its commits"
    except RepositoryNotFoundError:
        told = f"has no such dataset, or hides it; correct {key}.dataset, or {LOG_IN} with an account that may read it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise
        mend = f"{LOG_IN} with an account that may read it, or unset HF_TOKEN where it is no longer valid"
        told = f"refuses access (HTTP status {status}); {mend}"
    raise UserError(f"{config.dataset} at {config.revision}: the hub {told}")


class RetryingClient(httpx2.Client):
    """Sends a request until its answer has arrived whole.

    Bodies are read here, where one that breaks or stalls in the middle is asked for again by itself: `datasets` reads
    pieces of a few megabytes, but could only open the whole file anew.
    """

    def __init__(self, *, waits_s: Sequence[float] = WAITS_S, **options: Any) -> None:
        """`waits_s`: seconds before each new try where the server names none."""
        super().__init__(**options)
        self._waits_s = waits_s

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """Raises UserError after the last try."""
        where = f"hub: {request.url.host}{request.url.path}"  # no query: that of a redirect holds a signature
        tries = len(self._waits_s) + 1
        for number in count(1):
            try:
                return self._whole_answer(request, options)
            except _PassingFault as fault:
                if number == tries:
                    raise UserError(
                        f"{where}: {fault}, the last of {tries} tries; once the network and the hub are well, run "
                        "the same command again: it goes on from the last finished shard"
                    ) from None
                wait_s = min(self._waits_s[number - 1] if fault.wait_s is None else fault.wait_s, LONGEST_WAIT_S)
                tqdm.write(f"{where}: {fault}; try {number + 1} of {tries} in {wait_s:g} s", file=sys.stderr)
                time.sleep(wait_s)

    def _whole_answer(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        try:
            response = super().send(request, stream=False, **options)
        except httpx2.ReadTimeout:
            raise _PassingFault("the read stalled") from None
        except PASSING_ERRORS as error:
            raise _PassingFault(" ".join(str(error).split())[:120] or type(error).__name__) from None
        status = response.status_code
        if status in (httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_MANY_REQUESTS) or status >= 500:
            raise _PassingFault(f"HTTP status {status}", _asked_wait_s(response))
        if request.method == "GET" and "range" in request.headers and status in (200, 206):
            _refuse_other_range(response)
        return response


class _PassingFault(Exception):
    """What may be gone at the next try. `wait_s`: what the server asked for."""

    def __init__(self, fault: str, wait_s: float | None = None) -> None:
        super().__init__(fault)
        self.wait_s = wait_s


def _asked_wait_s(response: httpx2.Response) -> float | None:
    """Seconds after which the server wants to be asked again; None where it does not say, or says a date."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    after = response.headers.get("retry-after", "").strip()
    return float(after) if after.isdigit() else None


def _refuse_other_range(response: httpx2.Response) -> None:
    """A proxy that cuts a body and corrects its length leaves nothing else to see it by."""
    if response.status_code == httpx2.codes.OK:
        raise _PassingFault("the whole file where a range was asked for")
    first, _, last = response.headers.get("content-range", "").removeprefix("bytes ").partition("/")[0].partition("-")
    promised = int(last) - int(first) + 1 if first.isdigit() and last.isdigit() else None
    if promised != len(response.content):
        raise _PassingFault(f"{len(response.content)} bytes of a range of {promised}")
