"""`microlm export`: a model as a folder for the hub, or as one GGUF file for llama.cpp."""

import argparse
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlm.commands.named_models import HELP, load_named, normal_name, without_revision
from microlm.errors import UserError, plain
from microlm.files import atomic_directory, atomic_file, sha256_file, write_sums
from microlm.runtime.paths import CARD

if TYPE_CHECKING:
    from microlm.corpus.tokenizer import Tokenizer
    from microlm.evaluation.candidates import Candidate
    from microlm.models.gguf_export import Ends
    from microlm.models.student import StudentLM

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # and how files of GGUF are named after them
# what a published folder holds; an optimizer's moments are for a continuation here alone
PUBLISHED = (".json", ".safetensors", ".md", ".txt", ".jinja")
LEFT = ("optimizer.safetensors",)
MEND = "export another model"


def add_parser(commands: Any) -> None:
    add = commands.add_parser("export", help="a folder for the hub, or a GGUF for llama.cpp").add_argument
    add("model", metavar="MODEL", help=HELP)
    add("--out", type=Path, metavar="FOLDER", help="weights, configuration, tokenizer and card, as the hub wants them")
    gguf_help = "write a GGUF (default <model>-F16.gguf, in --out if that is given)"
    add("--gguf", nargs="?", const="", metavar="FILE", help=gguf_help)
    add("--dtype", choices=DTYPES, default="float16", help="of the GGUF's matrices (default float16)")


def run(arguments: argparse.Namespace) -> None:
    name, out, gguf = normal_name(arguments.model), arguments.out, arguments.gguf
    if out is None and gguf is None:
        raise UserError("microlm export: name what to write: --out FOLDER, --gguf, or both")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is no folder; name another, or move the file away")
    file = None if gguf is None else Path(gguf or f"{_title(name)}-{DTYPES[arguments.dtype]}.gguf")
    if file is not None and file.is_dir():
        raise UserError(f"--gguf: {file} is a folder; name a file in it")

    import torch

    from microlm.runtime.device import quiet_libraries

    quiet_libraries()
    candidate = load_named(name, torch.float32)
    inside = out is not None and gguf == ""
    if out is not None:
        _write_folder(candidate, out, file if inside else None, arguments.dtype)
        print(f"{plain(str(out))}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:,.0f} MB")
    if file is not None:
        if not inside:
            with atomic_file(file) as opened:
                _write_gguf(candidate, Path(opened.name), arguments.dtype)
                if file.exists() and sha256_file(file) != sha256_file(opened.name):
                    raise _other(file)
        written = out / file if inside else file
        told = f"{written.stat().st_size / 1e6:,.0f} MB, {candidate.parameters:,} parameters, {arguments.dtype}"
        print(f"{plain(str(written))}: {told}")


def _title(name: str) -> str:
    """What a folder or the hub calls the model, without where it lies."""
    return Path(without_revision(name)[0]).resolve().name


class _StandsAlready(Exception):
    """What was to be written is there."""


def _write_folder(candidate: "Candidate", out: Path, gguf: Path | None, dtype: str) -> None:
    """Whole or not at all, and over nothing: what is there is the same and stays, or is refused."""
    there = out.exists() and any(out.iterdir())
    with suppress(_StandsAlready), atomic_directory(out.absolute()) as folder:
        _fill(folder, candidate)
        if gguf is not None:
            _write_gguf(candidate, folder / gguf, dtype)
        write_sums(folder)
        if there and _digests(out) == _digests(folder):
            raise _StandsAlready
        if there:
            raise _other(out)


def _fill(folder: Path, candidate: "Candidate") -> None:
    from microlm.evaluation.candidates import PACKAGED
    from microlm.models.model_files import is_ours, save_student
    from microlm.report.model_card import refuse_other_weights

    source = Path(candidate.name)
    if source.is_dir():
        if is_ours(source):
            refuse_other_weights(source)
        for path in source.iterdir():
            if path.is_file() and path.suffix in PUBLISHED and path.name not in LEFT:
                shutil.copyfile(path, folder / path.name)
    elif candidate.name == PACKAGED:
        save_student(*_parts(candidate), folder / "model")
        for path in (folder / "model").iterdir():
            path.rename(folder / path.name)
        (folder / "model").rmdir()
    else:
        raise UserError(f"{candidate.name}: is on the hub already; with --out name a folder or packaged")


def _digests(folder: Path) -> dict[str, str]:
    """{name: sha256} of what lies in a folder; of a folder in it nothing is known."""
    return {path.name: sha256_file(path) if path.is_file() else "" for path in folder.iterdir()}


def _other(path: Path) -> UserError:
    return UserError(f"{path}: is there already, and is something else; name another place, or move it away")


def _write_gguf(candidate: "Candidate", path: Path, dtype: str) -> None:
    from microlm.evaluation.candidates import PACKAGED
    from microlm.models.gguf_export import write_gguf
    from microlm.report.licences import teacher_work

    student, tokenizer = _parts(candidate)
    packaged = candidate.name == PACKAGED
    licence = teacher_work(PACKAGED).licence if packaged else _licence(Path(candidate.name))
    write_gguf(path, student, tokenizer, _title(candidate.name), dtype, _ends(candidate, tokenizer), licence)


def _parts(candidate: "Candidate") -> "tuple[StudentLM, Tokenizer]":
    """The model as a student of its own full shape, and its tokenizer."""
    from microlm.corpus.tokenizer import Tokenizer
    from microlm.models.model_files import as_student
    from microlm.models.student import StudentLM
    from microlm.models.teacher_source import TeacherSource

    model, tokenizer = candidate.model, candidate.tokenizer
    student = model if isinstance(model, StudentLM) else as_student(model, candidate.name, MEND)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = TeacherSource(*without_revision(candidate.name)).tokenizer()
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{candidate.name}: its tokenizer is no byte-level BPE, and no other is exported; {MEND}")
    return student, tokenizer


def _ends(candidate: "Candidate", tokenizer: "Tokenizer") -> "Ends":
    """As `microlm generate` begins and ends a text of the model."""
    from microlm.models.gguf_export import Ends
    from microlm.models.transformers_model import TransformersModel

    eos = None
    if isinstance(candidate.model, TransformersModel):
        eos = candidate.model.network.generation_config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
    begin = (tokenizer.eot_id,) if candidate.tokenizer is tokenizer else candidate.begin
    return Ends((*begin, tokenizer.eot_id)[0], tokenizer.eot_id if eos is None else eos, bool(begin))


def _licence(folder: Path) -> str | None:
    """As the model's card has it."""
    from huggingface_hub import metadata_load

    if not (folder / CARD).is_file():
        return None
    try:
        return (metadata_load(folder / CARD) or {}).get("license")
    except ValueError:
        return None
