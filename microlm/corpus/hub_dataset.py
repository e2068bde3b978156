"""A dataset on the hub, at its pinned revision: found, or refused in one line that says what to mend."""

import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from microlm.corpus.hub_retry import retry_requests
from microlm.errors import UserError
from microlm.parameters import CorpusConfig

if TYPE_CHECKING:
    from datasets import DatasetBuilder

LOG_IN = "log in (hf auth login, or HF_TOKEN)"


def advice(key: str) -> str:
    """What to do about a dataset that cannot be read; `key` of params.yaml names it."""
    return f"check {key}.dataset, subset and revision and the network, or use local files"


@cache
def library() -> ModuleType:
    """`datasets`, which says nothing by itself. Who only encodes texts imports this module too, and does without it."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # counts are another host's, whose absence would be waited out
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it says of an unreadable file, our error says shorter
    return datasets


def find_dataset(config: CorpusConfig, key: str = "corpus") -> "DatasetBuilder":
    """The builder of the subset, whose `config.data_files` has the files of each split. A folder passes for a dataset.

    Args:
        key: of params.yaml, that names the dataset.

    Raises:
        UserError: the hub refuses for good (no such dataset or revision, no access), or is out of reach for minutes.
    """
    retry_requests()
    if not Path(config.dataset).exists():
        _refuse_absent(config, key)
    # an empty cache: `datasets` would fall back on whichever revision it finds there
    with tempfile.TemporaryDirectory() as empty:
        return library().load_dataset_builder(
            config.dataset, name=config.subset, revision=config.revision, cache_dir=empty
        )


def _refuse_absent(config: CorpusConfig, key: str) -> None:
    where = f"{config.dataset} at {config.revision}"
    try:
        HfApi().dataset_info(config.dataset, revision=config.revision)
    except GatedRepoError:
        mend = f"accept its terms on the dataset's page, then {LOG_IN}"
        raise UserError(f"{where}: the hub gives this dataset only to who has accepted its terms; {mend}") from None
    except RevisionNotFoundError:
        mend = f"set {key}.revision to the full hash of one of its commits"
        raise UserError(f"{where}: the hub has the dataset, but no such revision; {mend}") from None
    except RepositoryNotFoundError:
        mend = f"correct {key}.dataset, or {LOG_IN} with an account that may read it"
        raise UserError(f"{where}: the hub has no such dataset, or hides it; {mend}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise
        mend = f"{LOG_IN} with an account that may read it, or unset HF_TOKEN where it is no longer valid"
        raise UserError(f"{where}: the hub refuses access (HTTP status {status}); {mend}") from None
