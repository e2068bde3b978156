"""The teacher's labels: check that the teacher fits, run it once, write data/teacher and metrics/teacher.json."""

import os
import time
from pathlib import Path

import numpy as np

from microlm import gguf_llama, hub
from microlm.config import Config
from microlm.console import banner, progress_bar
from microlm.corpus.batches import cached_windows, read_batch
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError
from microlm.evaluation.validation import ValidationLoss, validation_loss
from microlm.files import atomic_directory, write_json
from microlm.language_model import LanguageModel
from microlm.runtime import Runtime, peak_memory_bytes
from microlm.scratch import code_digest, scratch
from microlm.teacher import cache as cache_module
from microlm.teacher import capture as capture_module
from microlm.teacher.cache import MANIFEST, CacheIdentity, cache_identity, manifest_of
from microlm.teacher.capture import capture

SHARDS, CACHE, METRICS = Path("data/shards"), Path("data/teacher"), Path("metrics/teacher.json")
CODE = (gguf_llama, hub, cache_module, capture_module)


def label(config: Config, runtime: Runtime) -> None:
    """Write the top-k cache of the windows that `continue` and `distill` train on."""
    shards, tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    identity, windows = (
        cache_identity(config, shards),
        cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows),
    )
    refuse_impossible(identity, config)
    model = hub.load_teacher(config.at.teacher, runtime.dtype)
    refuse_misfit(model, identity, config)
    model.to(runtime.device)
    weights_sha256 = hub.teacher_fingerprint(config.at.teacher, model)
    tokens = len(windows) * identity.seq_len
    banner(
        f"teacher: {config.at.teacher.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
        [
            *runtime.lines(),
            f"cache    {tokens:,} tokens, top {identity.top_k}, {identity.record().itemsize} bytes each: "
            f"{tokens * identity.record().itemsize / 2**20:,.0f} MiB",
        ],
    )
    inputs = [identity.as_json(), weights_sha256, str(runtime.dtype), runtime.compiled, code_digest(*CODE)]
    began = time.perf_counter()
    with scratch("teacher", inputs) as directory:
        with progress_bar(tokens, 0, "tok", "teacher") as bar:
            fresh = capture(
                model, shards, windows, identity, directory, config.at.teacher.batch_rows, runtime.compiled, bar.update
            )
        capture_s = time.perf_counter() - began
        manifest = manifest_of(identity, weights_sha256, str(runtime.dtype), directory)
        train = _loss_in(directory, identity, shards, windows, tokenizer)
        head_mass = _head_mass(directory, identity)
        with atomic_directory(CACHE) as folder:
            for name, _ in identity.blocks():
                os.replace(directory / name, folder / name)
            write_json(folder / MANIFEST, manifest)
    val = validation_loss(
        model,
        TokenShards(SHARDS, "val"),
        tokenizer.byte_lengths,
        identity.seq_len,
        config.at.pretrain.validation_windows,
        config.at.teacher.batch_rows,
    )
    write_json(
        METRICS,
        {
            "model": config.at.teacher.model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": tokens,
            "top_k": identity.top_k,
            "bytes_per_token": identity.record().itemsize,
            "head_mass": head_mass,
            "train": {"nats": train.nats, "bpb": train.bpb},
            "val": {"nats": val.nats, "bpb": val.bpb},
            "tokens_per_s": round(fresh / capture_s, 1),
            "elapsed_s": round(time.perf_counter() - began, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )


def refuse_impossible(identity: CacheIdentity, config: Config) -> None:
    if identity.top_k > identity.n_vocab:
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.top_k: {identity.top_k} is more than the vocabulary of "
            f"{identity.n_vocab}; lower it"
        )


def refuse_misfit(model: LanguageModel, identity: CacheIdentity, config: Config) -> None:
    """A teacher speaks of the tokens and windows of this corpus, or is refused before it runs."""
    where = f"params.yaml: scales.{config.scale}"
    if model.n_vocab != identity.n_vocab:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has {model.n_vocab} tokens, data/shards {identity.n_vocab}; "
            "choose a teacher and a corpus.tokenizer that go together"
        )
    if identity.seq_len > model.context:
        raise UserError(
            f"{where}.batch.seq_len: {identity.seq_len} is more than the teacher's context of {model.context}; lower it"
        )
    if hub.teacher_tokenizer_fingerprint(config.at.teacher) != identity.tokenizer:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has another tokenizer than data/shards (corpus.tokenizer: "
            f"{config.at.corpus.tokenizer}); choose a teacher and a corpus.tokenizer that go together"
        )


def _records(directory: Path, identity: CacheIdentity) -> list[tuple[slice, np.memmap]]:
    shape = (-1, identity.seq_len)
    return [
        (part, np.memmap(directory / name, identity.record(), "r").reshape(shape)) for name, part in identity.blocks()
    ]


def _loss_in(
    directory: Path, identity: CacheIdentity, shards: TokenShards, windows: np.ndarray, tokenizer: Tokenizer
) -> ValidationLoss:
    """The teacher's own loss on the cached windows, from the gold log-probabilities."""
    nats = np.concatenate([-block["gold"].sum(-1, dtype=np.float64) for _, block in _records(directory, identity)])
    targets = [
        read_batch(shards, windows[part], identity.seq_len).targets.numpy() for part, _ in _records(directory, identity)
    ]
    lengths = np.concatenate([tokenizer.byte_lengths[t].sum(-1) for t in targets])
    return ValidationLoss(windows, nats, lengths, len(windows) * identity.seq_len)


def _head_mass(directory: Path, identity: CacheIdentity) -> float:
    """Mean probability that the k cached tokens hold."""
    at = identity.temperatures.index(1.0)
    masses = [1 - np.exp(block["log_tail"][..., at].astype(np.float64)) for _, block in _records(directory, identity)]
    return float(np.concatenate([m.ravel() for m in masses]).mean())
