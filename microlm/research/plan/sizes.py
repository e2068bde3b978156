"""What is not in params.yaml and yet decides everything: vocabulary, tokens of the corpus, the models' shapes."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from microlm.config import PARAMS, Config
from microlm.corpus.outside import MOST_TOKENS
from microlm.corpus.parts import GEMMA3_MODEL
from microlm.corpus.sources import CORPUS, OUTSIDE, matching_files
from microlm.corpus.tokenizer import json_tokenizer
from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.start_request import known_shape, pruned_shape
from microlm.models.student import parameter_count
from microlm.parameters import CorpusConfig, HubText, ScaleConfig
from microlm.pipeline.start import fresh_shape
from microlm.teacher.cache import CacheIdentity
from microlm.training.memory import FLOAT32

PACKAGED_TEXT_BYTES = 6_665_249  # both splits; metrics/tokenize.json
PACKAGED_OUTSIDE_BYTES = 395_099  # metrics/outside.json
BYTES_PER_TOKEN = 4.4976  # of English text under a vocabulary of 50,000; metrics/tokenize.json


@dataclass(frozen=True)
class Vocabulary:
    size: int
    file_bytes: int  # of the tokenizer's files, which lie beside the shards and beside each model


@dataclass(frozen=True)
class TeacherShape:
    """`multiplied`: the parameters that a token's forward pass multiplies; an embedding that is no head is not."""

    parameters: int
    multiplied: int
    layers: int = 0  # 0 where only the number of parameters is known: attention over the context is then left out
    hidden_size: int = 0
    attention_width: int = 0
    intermediate_size: int = 0
    padded_vocab: int = 0


VOCABULARIES = {
    "smollm2": Vocabulary(49_152, 1_563_597),
    "gpt2": Vocabulary(50_257, 1_555_615),
    "olmo": Vocabulary(50_280, 1_361_162),
}
KNOWN_TEACHERS = {
    "packaged": TeacherShape(134_515_008, 134_515_008, 30, 576, 576, 1536, 49_152),
    GEMMA3_MODEL: TeacherShape(268_098_176, 268_098_176, 18, 640, 1024, 2048, 262_144),
    "allenai/OLMo-1B-hf": TeacherShape(1_176_764_416, 1_176_764_416, 16, 2048, 2048, 8192, 50_304),
}


class Sizes:
    """A scale, and what it comes to."""

    def __init__(self, config: Config, teacher_parameters: int | None) -> None:
        """UserError where something that decides a size is not known, or the corpus does not fill a window."""
        self.config, at, self._seq_len = config, config.at, config.at.batch.seq_len
        self.vocabulary = vocabulary_of(at.corpus.tokenizer)
        self.student = student_shape(config, self.vocabulary)
        self.train_tokens, self.val_tokens = corpus_tokens(at.corpus)
        self.teacher = teacher_shape(at.teacher.model, teacher_parameters)
        self.outside_tokens = outside_tokens(at)
        if min(self.windows(self.train_tokens), self.windows(self.val_tokens)) < 1:
            raise UserError(
                f"{PARAMS}: scales.{config.scale}.corpus: about {self.train_tokens} training and {self.val_tokens} "
                f"validation tokens do not fill a window of batch.seq_len={self._seq_len} each"
            )
        self.labelled = min(at.teacher.windows, self.windows(self.train_tokens))  # windows that the teacher sees
        self.labelled_tokens = self.labelled * self._seq_len
        student, teacher, multiplied = self.student, self.teacher, parameter_count(self.student)
        if not student.tied:  # an embedding that is no head is looked up
            multiplied -= student.padded_vocab * student.hidden_size
        self.student_forward = forward_flops(multiplied, student.layers, student.query_width, self._seq_len)
        self.teacher_forward = forward_flops(teacher.multiplied, teacher.layers, teacher.attention_width, self._seq_len)
        layout = (at.teacher.top_k, tuple(at.teacher.temperatures), at.teacher.record)
        # whose cache it is stays open
        cache = CacheIdentity("", None, "", self.vocabulary.size, "", self._seq_len, self.labelled, *layout)
        self.cache = replace(cache, teacher_tokenizer="its own") if at.teacher.model == GEMMA3_MODEL else cache

    def windows(self, tokens: int) -> int:
        return max(0, tokens - 1) // self._seq_len

    def held_out(self, windows: int | None) -> int:
        """Tokens of so many windows (None: all) of each text that is held out."""
        texts = (self.windows(self.val_tokens), self.windows(self.outside_tokens))
        return sum(min(windows or there, there) for there in texts) * self._seq_len

    def cache_bytes(self, source: str) -> int:
        """Records, where the teacher's source is a cache, and table, without the manifest."""
        tokens = self.labelled_tokens if source == "cache" else 0
        return tokens * self.cache.token_bytes + FLOAT32 * len(self.cache.temperatures) * self.vocabulary.size


def forward_flops(multiplied: int, layers: int, width: int, positions: int) -> int:
    """Of one token in a context of `positions`; a multiplication and an addition are two operations.

    2 N for the N parameters that the pass multiplies (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), 4 L W T for
    attention over T positions in L layers of width W (Hoffmann et al. 2022, arXiv:2203.15556, appendix F: scores and
    weighted sum, the causal half not discounted).
    """
    return 2 * multiplied + 4 * layers * width * positions


def vocabulary_of(tokenizer: str) -> Vocabulary:
    """By name, or of the tokenizer.json at that path. UserError as `json_tokenizer`."""
    if tokenizer in VOCABULARIES:
        return VOCABULARIES[tokenizer]
    return Vocabulary(json_tokenizer(Path(tokenizer)).n_vocab, Path(tokenizer).stat().st_size)


def student_shape(config: Config, vocabulary: Vocabulary) -> ModelShape:
    """UserError where it is cut out of a teacher whose shape is not known here."""
    if config.start_kind != "pruned":
        return fresh_shape(config.at.model, vocabulary.size)
    teacher = known_shape(config.at.teacher.model, vocabulary.size)
    if teacher is None:
        raise UserError(
            f"start: pruned cuts the student out of {config.at.teacher.model}, which is no folder here, and nothing is "
            "asked of the hub: download it and name the folder in teacher.model, or plan with start: fresh"
        )
    return pruned_shape(config.at.start, teacher)


def corpus_tokens(corpus: CorpusConfig) -> tuple[int, int]:
    """Tokens of each split: of packaged text and local files by their bytes, of a hub's as many as are asked for."""
    share, train = corpus.validation_fraction, corpus.train_tokens
    if corpus.source != "hub":
        paths = corpus.paths if corpus.source == "files" else None
        there = int(_tokens(PACKAGED_TEXT_BYTES, paths, CORPUS) * (1 - share))
        train = there if train is None else min(there, train)
    if train is None:
        raise UserError("corpus.train_tokens: null reads the whole dataset, whose size is not known here; set it")
    return train, int(train * share / (1 - share))


def outside_tokens(at: ScaleConfig) -> int:
    """Of `evaluation.outside`: of packaged text and local files by their bytes, of a hub's as many as are read."""
    wanted = at.evaluation.outside
    if wanted is None or isinstance(wanted, HubText):
        return MOST_TOKENS if wanted else 0
    return min(int(_tokens(PACKAGED_OUTSIDE_BYTES, None if wanted == "packaged" else wanted, OUTSIDE)), MOST_TOKENS)


def _tokens(packaged_bytes: int, paths: list[str] | None, key: str) -> float:
    """Of the packaged text, or of the files that `key` names."""
    there = packaged_bytes if paths is None else sum(path.stat().st_size for path in matching_files(paths, key))
    return there / BYTES_PER_TOKEN


def teacher_shape(model: str, parameters: int | None) -> TeacherShape:
    """Of a known teacher, of the directory `model`, or of no more than its number of parameters.

    Raises:
        UserError: none of the three is there, or the directory's files are damaged.
    """
    if parameters is not None:
        return TeacherShape(parameters, parameters)
    if model in KNOWN_TEACHERS:
        return KNOWN_TEACHERS[model]
    directory = Path(model)
    if not directory.is_dir():
        raise UserError(
            f"teacher.model: {model} is no folder here and none of {', '.join(KNOWN_TEACHERS)}; nothing is asked of "
            "the hub, so say how large it is, e.g. --teacher-parameters 1176764416"
        )
    try:
        config = json.loads((directory / "config.json").read_text())
        vocab, hidden, heads = (config[key] for key in ("vocab_size", "hidden_size", "num_attention_heads"))
        layers, intermediate = config["num_hidden_layers"], config["intermediate_size"]
        head_dim = config.get("head_dim") or hidden // heads
        counted = sum(_elements(file) for file in directory.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{directory}: its shape could not be read ({type(error).__name__}: {error}); mend it, or say how large "
            "the teacher is with --teacher-parameters"
        ) from None
    if not counted:
        raise UserError(f"{directory}: holds no *.safetensors; put the weights there, or give --teacher-parameters")
    lookup = 0 if config.get("tie_word_embeddings", True) else vocab * hidden
    return TeacherShape(counted, counted - lookup, layers, hidden, heads * head_dim, intermediate, vocab)


def _elements(file: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with safe_open(file, "pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
