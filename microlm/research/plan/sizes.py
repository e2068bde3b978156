"""What is not in params.yaml and yet decides everything: vocabulary, tokens of the corpus, the teacher's shape."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from microlm.config import Config
from microlm.corpus.outside_source import KEY, MOST_TOKENS
from microlm.corpus.tokenizer import json_tokenizer
from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.start_request import known_shape, pruned_shape
from microlm.parameters import CorpusConfig, HubText, ScaleConfig
from microlm.pipeline.start import VOCABULARY_MULTIPLE

PACKAGED_TEXT_BYTES = 6_665_249  # both splits; metrics/tokenize.json
PACKAGED_OUTSIDE_BYTES = 395_099  # metrics/outside.json
BYTES_PER_TOKEN = 4.4976  # of English text under a vocabulary of 50,000; metrics/tokenize.json


@dataclass(frozen=True)
class Vocabulary:
    size: int
    file_bytes: int  # of the tokenizer's files, which lie beside the shards and beside each model


VOCABULARIES = {
    "smollm2": Vocabulary(49_152, 1_563_597),
    "gpt2": Vocabulary(50_257, 1_555_615),
    "olmo": Vocabulary(50_280, 1_361_162),
}


def vocabulary_of(tokenizer: str) -> Vocabulary:
    """By name, or of the tokenizer.json at that path. UserError as `json_tokenizer`."""
    if tokenizer in VOCABULARIES:
        return VOCABULARIES[tokenizer]
    return Vocabulary(json_tokenizer(Path(tokenizer)).n_vocab, Path(tokenizer).stat().st_size)


def student_shape(config: Config, vocabulary: Vocabulary) -> ModelShape:
    """UserError where it is cut out of a teacher whose shape is not known here."""
    padded = -(-vocabulary.size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if config.start_kind != "pruned":
        return ModelShape(n_vocab=vocabulary.size, padded_vocab=padded, **vars(config.at.model))
    teacher = known_shape(config.at.teacher.model, vocabulary.size)
    if teacher is None:
        raise UserError(
            f"start: pruned cuts the student out of {config.at.teacher.model}, which is no folder here, and nothing is "
            "asked of the hub: download it and name the folder in teacher.model, or plan with start: fresh"
        )
    return pruned_shape(config.at.start, teacher)


@dataclass(frozen=True)
class CorpusSize:
    train_tokens: int
    val_tokens: int


def corpus_size(corpus: CorpusConfig) -> CorpusSize:
    """Tokens of each split: of packaged text and local files by their bytes, of a hub's as many as are asked for."""
    share = corpus.validation_fraction
    if corpus.source == "hub":
        if corpus.train_tokens is None:
            raise UserError("corpus.train_tokens: null reads the whole dataset, whose size is not known here; set it")
        train = corpus.train_tokens
    else:
        size = PACKAGED_TEXT_BYTES
        if corpus.source == "files":
            from microlm.corpus.sources import matching_files  # which needs `datasets`

            size = sum(path.stat().st_size for path in matching_files(corpus.paths))
        train = int(size / BYTES_PER_TOKEN * (1 - share))
        train = train if corpus.train_tokens is None else min(train, corpus.train_tokens)
    return CorpusSize(train, int(train * share / (1 - share)))


def outside_tokens(at: ScaleConfig) -> int:
    """Of `evaluation.outside`: of packaged text and local files by their bytes, of a hub's as many as are read."""
    wanted = at.evaluation.outside
    if wanted is None or isinstance(wanted, HubText):
        return MOST_TOKENS if wanted else 0
    size = PACKAGED_OUTSIDE_BYTES
    if wanted != "packaged":
        from microlm.corpus.sources import matching_files

        size = sum(path.stat().st_size for path in matching_files(wanted, KEY))
    return min(int(size / BYTES_PER_TOKEN), MOST_TOKENS)


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


KNOWN_TEACHERS = {
    "packaged": TeacherShape(134_515_008, 134_515_008, 30, 576, 576, 1536, 49_152),
    "allenai/OLMo-1B-hf": TeacherShape(1_176_764_416, 1_176_764_416, 16, 2048, 2048, 8192, 50_304),
}


def teacher_shape(model: str, parameters: int | None) -> TeacherShape:
    """Of a known teacher, of the directory `model`, or of no more than its number of parameters.

    Raises:
        UserError: none of the three is there, or the directory's files are damaged.
    """
    if parameters is not None:
        return TeacherShape(parameters, parameters)
    if model in KNOWN_TEACHERS:
        return KNOWN_TEACHERS[model]
    if not Path(model).is_dir():
        raise UserError(
            f"teacher.model: {model} is no folder here and none of {', '.join(KNOWN_TEACHERS)}; nothing is asked of "
            "the hub, so say how large it is, e.g. --teacher-parameters 1176764416"
        )
    return _shape_of_directory(Path(model))


def _shape_of_directory(directory: Path) -> TeacherShape:
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
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
