"""A model to be evaluated, wherever it lies: in the pipeline, packaged, in a folder or on the hub."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from microlm.corpus.metaspace import TeacherTokenizer
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError, explained
from microlm.files import sha256_bytes, sha256_file
from microlm.models import model_files
from microlm.models.interface import LanguageModel
from microlm.models.model_names import refuse_absent_folder
from microlm.models.student import Linear
from microlm.models.teacher_source import PACKAGED_TEACHERS, TeacherSource, teacher_source
from microlm.parameters import TeacherConfig
from microlm.runtime.paths import MODELS, SHARDS

if TYPE_CHECKING:  # a second that a model of ours does not need
    from transformers import PreTrainedTokenizerBase

PACKAGED = "packaged"


class WeightsNotAvailable(UserError):
    """The hub cannot be reached, or has no such model: nothing is wrong with what was asked for."""


class TransformersTokenizer:
    """A Hugging Face tokenizer as the evaluator wants it: many texts to ids, no special token added.

    `begin` holds the begin-of-text token of a tokenizer that puts one before every text by its own settings, and the
    fingerprint with it; of others it is empty.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        rules = getattr(tokenizer, "backend_tokenizer", None)
        said = rules.to_str() if rules is not None else repr(sorted(tokenizer.get_vocab().items()))
        plain, begun = (tokenizer("a", add_special_tokens=asked)["input_ids"] for asked in (False, True))
        bos = tokenizer.bos_token_id
        self.begin = (bos,) if bos is not None and begun[:1] == [bos] != plain[:1] else ()
        self.fingerprint = sha256_bytes(said.encode() + "".join(f"\nbegin {token}" for token in self.begin).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Candidate:
    """A loaded model with all that scoring it takes, and what tells it from any other."""

    name: str  # as it was asked for
    model: LanguageModel
    tokenizer: "TeacherTokenizer | TransformersTokenizer"
    start_token: int | None  # what an empty context becomes
    weights: str  # sha256, or the hub's commit
    begin: tuple[int, ...] = ()  # ids before every text that is encoded as one with its ending

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_candidate(name: str, revision: str | None, dtype: torch.dtype) -> Candidate:
    """A packaged teacher by its name, a model directory of ours or of Hugging Face's, or a hub id.

    Raises:
        WeightsNotAvailable: a hub id's weights or tokenizer cannot be had.
        UserError: weights or tokenizer are absent or damaged.
    """
    if name in PACKAGED_TEACHERS:
        return _teacher(name, PACKAGED_TEACHERS[name](), dtype)
    directory = Path(name)
    if directory.is_dir() and model_files.is_ours(directory):
        try:
            tokenizer = load_tokenizer(directory)
        except UserError as error:
            raise UserError(f"{error}; or make the model again, which has its tokenizer beside its weights") from None
        return _student(name, directory, tokenizer, dtype)
    refuse_absent_folder(name)
    try:
        model, tokenizer = model_files.from_transformers(name, revision, dtype, "model")
        model.refuse_foreign_logits(name)
    except UserError as error:
        if directory.is_dir() or not _cannot_be_had(error):
            raise
        raise WeightsNotAvailable(str(error)) from None
    theirs = TransformersTokenizer(tokenizer)
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    commit = None if directory.is_dir() else getattr(model.network.config, "_commit_hash", None)
    weights = commit or model_files.weights_sha256(directory)
    return Candidate(name, model, theirs, start, weights, theirs.begin)


def _cannot_be_had(error: BaseException) -> bool:
    """Told by the errors that it was raised from, also where these were hidden from the reader.

    An id or file that is malformed is another matter, as is a full or forbidden disk.
    """
    below: list[BaseException] = []
    while (cause := error.__cause__ or error.__context__) is not None:
        below.append(error := cause)
    disk = any(isinstance(one, PermissionError) or (isinstance(one, OSError) and explained(one)) for one in below)
    malformed = any(isinstance(one, ValueError) for one in below)
    return bool(below) and isinstance(below[0], OSError) and not disk and not malformed


def load_pipeline_model(name: str, teacher: TeacherConfig, dtype: torch.dtype) -> Candidate:
    """`control`, `continued`, `student` or `teacher`. The corpus's tokenizer is everybody's but, maybe, the teacher's.

    Raises:
        UserError: the weights are absent, damaged or unreachable.
    """
    if name == "teacher":
        return _teacher(name, teacher_source(teacher), dtype)
    return _student(name, MODELS / name, load_tokenizer(SHARDS / "tokenizer"), dtype)


def _teacher(name: str, source: TeacherSource, dtype: torch.dtype) -> Candidate:
    tokenizer, model = source.tokenizer(), source.load(dtype)
    start = (*tokenizer.begin, tokenizer.eot_id)[0]
    return Candidate(name, model, tokenizer, start, source.fingerprint(model), tokenizer.begin)


def _student(name: str, directory: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> Candidate:
    """With its matrices in the dtype of its activations, to which each forward pass casts them otherwise."""
    model = model_files.load_student(directory, dtype)
    for module in model.modules():
        if isinstance(module, (Linear, torch.nn.Embedding)):
            module.weight = torch.nn.Parameter(module.weight.to(model.activation_dtype), requires_grad=False)
    return Candidate(name, model.eval(), tokenizer, tokenizer.eot_id, sha256_file(directory / model_files.WEIGHTS))
