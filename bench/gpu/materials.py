"""What steps are fed: random tokens, a cache of random records, and the teachers that run live."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.gpu.setting import Setting
from bench.gpu.tiny import write_shards
from microlm.config import Config
from microlm.corpus.batches import Batches, window_count
from microlm.corpus.shards import TokenShards
from microlm.files import write_json
from microlm.models.interface import LanguageModel
from microlm.models.teacher_source import teacher_source
from microlm.models.transformers_model import TransformersModel
from microlm.parameters import TeacherConfig
from microlm.teacher.cache import MANIFEST, TABLE, CacheIdentity, TeacherCache, manifest_of

# 1.18B parameters (allenai/OLMo-1B-hf's config.json; its norms have no gains)
OLMO_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
OLMO_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DRAWN_WINDOWS = 16  # of which a cache of any length is made: what is timed does not depend on what the records say


def random_shards(directory: Path, n_vocab: int, tokens: int) -> TokenShards:
    """A training split of random tokens, as skewed to the frequent ones as text is."""
    drawn = np.random.default_rng(0).random(tokens) ** 3 * n_vocab
    described = {"name": "random", "fingerprint": "random", "n_vocab": n_vocab, "eot_id": 0}
    write_shards(directory, described, {"train": drawn.astype(np.int64)})
    return TokenShards(directory, "train")


def batches_of(config: Config, directory: Path, n_vocab: int, rows: int) -> Batches:
    """Steps of the configured length in micro-batches of `rows`; the windows of one step make the epoch."""
    batch = replace(config.at.batch, micro_batch_rows=rows)
    name = directory / f"shards-{n_vocab}"
    there = (name / "manifest.json").is_file()
    shards = TokenShards(name, "train") if there else random_shards(name, n_vocab, batch.batch_tokens + 1)
    return Batches(shards, batch, seed=0)


def identity_of(config: Config, batches: Batches, n_vocab: int) -> CacheIdentity:
    """Of the cache, or of what a live teacher says, in the records that params.yaml chooses."""
    teacher, seq_len = config.at.teacher, batches.config.seq_len
    return CacheIdentity(
        "random", None, "random", n_vocab, batches.shards.digest, seq_len, window_count(batches.shards, seq_len),
        teacher.top_k, tuple(teacher.temperatures), teacher.record,
    )  # fmt: skip


def random_cache(directory: Path, identity: CacheIdentity) -> TeacherCache:
    """On disk, of distinct ids as skewed to the frequent tokens as a teacher's are; the one there, if there is one.

    A step's records are read ahead in a thread, beyond the last step too: what it maps must not be written anew.
    """
    if (directory / MANIFEST).is_file():
        return TeacherCache(directory, identity, np.arange(identity.windows))
    directory.mkdir(parents=True, exist_ok=True)
    generator, k = np.random.default_rng(1), identity.top_k
    drawn = min(DRAWN_WINDOWS, identity.windows)
    shape = (drawn * identity.seq_len, k)
    spread = generator.random(shape).cumsum(-1) ** 2.2 * (identity.n_vocab / k**2.2)
    ids = np.minimum(spread.astype(np.int64) + np.arange(k), identity.n_vocab - k + np.arange(k))
    logits = 2 * generator.standard_normal((shape[0], k + 1))
    log_p = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, ::-1].copy()
    tail = np.repeat(log_p[:, -1:], len(identity.temperatures), 1)
    rows = identity.layout.pack(*(torch.from_numpy(column) for column in (ids, log_p[:, :-1], tail)))
    windows = rows.view(drawn, identity.seq_len, -1).numpy()
    for name, part in identity.blocks():
        gold = np.zeros((part.stop - part.start, identity.seq_len), np.float32)
        chosen = np.arange(part.start, part.stop) % drawn
        (directory / name).write_bytes(windows[chosen].tobytes() + gold.tobytes())
    (directory / TABLE).write_bytes(flat_tables(identity).numpy().tobytes())
    write_json(directory / MANIFEST, manifest_of(identity, "", "torch.bfloat16", directory))
    return TeacherCache(directory, identity, np.arange(identity.windows))


def flat_tables(identity: CacheIdentity) -> torch.Tensor:
    """Of a live teacher, too: a lumped or capped tail does not read them."""
    return torch.full((len(identity.temperatures), identity.n_vocab), -float(np.log(identity.n_vocab)))


def smollm2(setting: Setting) -> LanguageModel:
    """The packaged teacher of the bundle, the rehearsal's own where there is none. In the workspace."""
    named = "data/tiny-teacher" if setting.rehearsal else "packaged"
    config = TeacherConfig(named, None, "cache", "full", top_k=1, temperatures=[1.0], windows=1, batch_rows=1)
    return teacher_source(config).load(setting.runtime.dtype).to(setting.device)


def olmo_1b(setting: Setting) -> LanguageModel:
    """OLMo-1B's shape with random weights."""
    from transformers import OlmoConfig, OlmoForCausalLM

    shape = OLMO_TINY if setting.rehearsal else OLMO_1B
    vocab, context = setting.sizes.n_vocab, setting.config.at.batch.seq_len
    with torch.device(setting.device):
        config = OlmoConfig(vocab_size=vocab, max_position_embeddings=max(2048, context), **shape, use_cache=False,
                            tie_word_embeddings=True, eos_token_id=None, attn_implementation="sdpa")  # fmt: skip
        network = OlmoForCausalLM(config).to(setting.runtime.dtype)
    return TransformersModel(network.requires_grad_(False), vocab).eval()
