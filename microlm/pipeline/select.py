"""Which windows `continue` and `distill` train on -> data/windows.npy, metrics/windows.json.

Difference sampling (Gu et al. 2025, "MiniPLM", arXiv:2410.17215, equation 4) keeps the windows with the largest
log p_teacher(x) - log p_reference(x) per token. The teacher's side is in its cache, as the log-probability of each
token of the text; the reference is the control. So it costs no pass of the teacher.
"""

import numpy as np

from microlm.config import Config
from microlm.corpus.batches import cached_windows, window_count
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import UserError
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.files import atomic_file, read_made, write_json
from microlm.models.model_files import load_student
from microlm.runtime.device import Runtime
from microlm.runtime.paths import CACHE, CONTROL, METRICS, SHARDS, WINDOWS
from microlm.teacher.cache import TeacherCache, cache_identity

RANDOM_STREAM = 1  # of the seed: another than that of the windows' order


def select_windows(config: Config, runtime: Runtime) -> None:
    """Write the windows, ascending, and what is known of them."""
    at, how, shards = config.at, config.at.continuation.windows, TokenShards(SHARDS, "train")
    pool, keep = _choice(config, shards)
    chosen, told = pool, {"windows": how, "count": keep}
    told["pool"] = len(cached_windows(shards, at.batch.seq_len, at.teacher.windows))
    if how == "random":
        draw = np.random.Generator(np.random.PCG64([config.seed, RANDOM_STREAM]))
        chosen = np.sort(draw.choice(pool, keep, replace=False))
    elif how == "difference":
        nats = _nats(config, runtime, shards, pool)
        best = largest_differences(*nats.values(), keep)
        chosen = pool[best]
        for name, places in (("chosen", best), ("all", slice(None))):
            told[name] = {whose: round(float(of[places].mean()), 6) for whose, of in nats.items()}
    with atomic_file(WINDOWS) as file:
        np.save(file, chosen)
    write_json(METRICS / "windows.json", told)


def _choice(config: Config, shards: TokenShards) -> tuple[np.ndarray, int]:
    """The windows that `continuation.windows` chooses among, ascending, and how many it takes of them."""
    at, wanted = config.at, config.at.continuation
    if wanted.windows == "any":
        pool = np.arange(window_count(shards, at.batch.seq_len))
    else:
        pool = cached_windows(shards, at.batch.seq_len, at.teacher.windows)
    share = wanted.select_fraction if wanted.windows in ("random", "difference") else 1
    return pool, max(1, round(share * len(pool)))


def chosen_windows(config: Config, shards: TokenShards) -> np.ndarray:
    """The windows that stage `select` wrote, int64 ascending, held against what this configuration can have chosen."""
    windows = read_made(WINDOWS, "select", lambda path: np.load(path, allow_pickle=False))
    pool, count = _choice(config, shards)
    if windows.shape != (count,) or not np.isin(windows, pool).all() or (np.diff(windows) <= 0).any():
        raise UserError(
            f"{WINDOWS} is damaged or of other parameters: not {count} of the {len(pool)} windows that "
            f"continuation.windows: {config.at.continuation.windows} can choose; make it again with: "
            "dvc repro -f -s select"
        )
    return windows


def largest_differences(teacher_nats: np.ndarray, reference_nats: np.ndarray, keep: int) -> np.ndarray:
    """Places, ascending, of the `keep` windows where the reference loses most nats to the teacher. All [W]."""
    return np.sort(np.argsort(teacher_nats - reference_nats, kind="stable")[:keep])


def _nats(config: Config, runtime: Runtime, shards: TokenShards, pool: np.ndarray) -> dict[str, np.ndarray]:
    """Nats per token of each window under the teacher, from its cache, and under the control."""
    batch = config.at.batch
    cache = TeacherCache(CACHE, cache_identity(config.at.teacher, batch.seq_len, shards), pool)
    if cache.identity.projected:
        raise UserError(
            "params.yaml: continuation.windows: difference compares the log-probabilities of all of a window's tokens, "
            "and a teacher with another tokenizer covers only some; choose cached or random"
        )
    control = load_student(CONTROL, runtime.dtype).to(runtime.device)
    lengths = load_tokenizer(SHARDS / "tokenizer").byte_lengths
    scored = loss_on(control, shards, lengths, batch.seq_len, pool, batch.micro_batch_rows)
    return {"teacher_nats": -cache.mean_gold(), "reference_nats": scored.window_nats / batch.seq_len}
