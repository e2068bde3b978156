"""Bytes on disk: what each stage leaves, and what an interrupted one keeps."""

from pathlib import Path

from microlm.config import Config
from microlm.corpus.parts import PARTS, needed_parts
from microlm.corpus.shards import HEADER, token_dtype
from microlm.models.architecture import ModelShape
from microlm.models.student import parameter_count
from microlm.research.plan.sizes import CorpusSize, TeacherShape, Vocabulary, outside_tokens
from microlm.teacher.cache import CacheIdentity
from microlm.training.memory import FLOAT32, optimizer_bytes


def cache_plan(config: Config, vocabulary: Vocabulary, windows: int) -> CacheIdentity:
    """The cache's layout; whose it is stays open."""
    teacher = config.at.teacher
    return CacheIdentity(
        teacher=teacher.model,
        revision=teacher.revision,
        tokenizer="",
        n_vocab=vocabulary.size,
        corpus="",
        seq_len=config.at.batch.seq_len,
        windows=windows,
        top_k=teacher.top_k,
        temperatures=tuple(teacher.temperatures),
        record=teacher.record,
        source=teacher.source,
    )


def storage(
    config: Config, corpus: CorpusSize, vocabulary: Vocabulary, shape: ModelShape, teacher: TeacherShape, windows: int
) -> dict[str, int]:
    """Bytes by what holds them. Two whole checkpoints exist while one replaces the other."""
    weights = FLOAT32 * parameter_count(shape)
    moments = optimizer_bytes(shape, config.at.pretrain.optimizer)
    found = {
        "data/parts": 2 * sum(PARTS[name].bytes for name in needed_parts(config.at)),  # what is taken out is smaller
        "data/shards": _shards(config.at.corpus.shard_tokens, corpus, vocabulary),
        "data/outside": token_dtype(vocabulary.size).itemsize * outside_tokens(config.at),
        "data/teacher": cache_bytes(cache_plan(config, vocabulary, windows)),
        "models/start": weights + vocabulary.file_bytes,
        "models/control": weights + moments + vocabulary.file_bytes,
        "models/continued": weights + vocabulary.file_bytes,
        "models/student": weights + vocabulary.file_bytes,
        "checkpoint": 2 * (weights + moments),
    }
    local = config.at.teacher.model == "packaged" or Path(config.at.teacher.model).is_dir()
    # published in float32 more often than not
    return found if local else found | {"teacher's weights": FLOAT32 * teacher.parameters}


def cache_bytes(identity: CacheIdentity) -> int:
    """Records, where the teacher's source is a cache, and table, without the manifest."""
    tokens = identity.windows * identity.seq_len if identity.source == "cache" else 0
    return tokens * identity.token_bytes + FLOAT32 * len(identity.temperatures) * identity.n_vocab


def _shards(shard_tokens: int, corpus: CorpusSize, vocabulary: Vocabulary) -> int:
    width = token_dtype(vocabulary.size).itemsize
    counts = (corpus.train_tokens, corpus.val_tokens)
    return sum(n * width + -(-n // shard_tokens) * HEADER.size for n in counts) + vocabulary.file_bytes
