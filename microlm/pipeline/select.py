"""Which windows `continue` and `distill` train on -> data/windows.npy, metrics/windows.json.

Difference sampling (Gu et al. 2025, "MiniPLM", arXiv:2410.17215, equation 4) keeps the windows with the largest
log p_teacher(x) - log p_reference(x) per token. The teacher's side is in its cache, as the log-probability of each
token of the text; the reference is the control. So it costs no pass of the teacher.
"""

from typing import Any

import numpy as np

from microlm.config import Config
from microlm.corpus.batches import cached_windows, window_count
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import UserError
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.files import atomic_file, write_json
from microlm.models.model_files import load_student
from microlm.runtime.device import Runtime
from microlm.runtime.paths import CACHE, CONTROL, METRICS, SHARDS, WINDOWS
from microlm.teacher.cache import TeacherCache, cache_identity

RANDOM_STREAM = 1  # of the seed: another than that of the windows' order


def select_windows(config: Config, runtime: Runtime) -> None:
    """Write the windows, ascending, and what is known of them."""
    wanted, shards = config.at.continuation, TokenShards(SHARDS, "train")
    pool = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    keep = max(1, round(wanted.select_fraction * len(pool)))
    chosen, told = pool, {}
    if wanted.windows == "any":
        chosen = np.arange(window_count(shards, config.at.batch.seq_len))
    elif wanted.windows == "random":
        draw = np.random.Generator(np.random.PCG64([config.seed, RANDOM_STREAM]))
        chosen = np.sort(draw.choice(pool, keep, replace=False))
    elif wanted.windows == "difference":
        teacher, reference = _nats(config, runtime, shards, pool)
        best = largest_differences(teacher, reference, keep)
        chosen, told = pool[best], _describe(teacher, reference, best)
    with atomic_file(WINDOWS) as file:
        np.save(file, chosen)
    write_json(METRICS / "windows.json", {"windows": wanted.windows, "count": len(chosen), "pool": len(pool), **told})


def read_windows() -> np.ndarray:
    """The windows that stage `select` wrote, int64 ascending."""
    try:
        return np.load(WINDOWS, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{WINDOWS} is not there; make it with: dvc repro select") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{WINDOWS} is damaged ({error}); make it again with: dvc repro -f -s select") from None


def chosen_windows(config: Config, shards: TokenShards) -> np.ndarray:
    """`read_windows`, held against what this configuration can have chosen."""
    windows, wanted = read_windows(), config.at.continuation
    if wanted.windows == "any":
        pool = np.arange(window_count(shards, config.at.batch.seq_len))
    else:
        pool = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    selects = wanted.windows in ("random", "difference")
    count = max(1, round(wanted.select_fraction * len(pool))) if selects else len(pool)
    if windows.shape != (count,) or not np.isin(windows, pool).all() or (np.diff(windows) <= 0).any():
        raise UserError(
            f"{WINDOWS} is damaged or of other parameters: not {count} of the {len(pool)} windows that "
            f"continuation.windows: {wanted.windows} can choose; make it again with: dvc repro -f -s select"
        )
    return windows


def largest_differences(teacher_nats: np.ndarray, reference_nats: np.ndarray, keep: int) -> np.ndarray:
    """Places, ascending, of the `keep` windows where the reference loses most nats to the teacher. All [W]."""
    return np.sort(np.argsort(teacher_nats - reference_nats, kind="stable")[:keep])


def _nats(config: Config, runtime: Runtime, shards: TokenShards, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats per token of each window under the teacher, from its cache, and under the control."""
    cache = TeacherCache(CACHE, cache_identity(config.at.teacher, config.at.batch.seq_len, shards), pool)
    if cache.identity.projected:
        raise UserError(
            "params.yaml: continuation.windows: difference compares the log-probabilities of all of a window's tokens, "
            "and a teacher with another tokenizer covers only some; choose cached or random"
        )
    teacher = -cache.mean_gold()
    control = load_student(CONTROL, runtime.dtype).to(runtime.device)
    lengths = load_tokenizer(SHARDS / "tokenizer").byte_lengths
    scored = loss_on(control, shards, lengths, config.at.batch.seq_len, pool, config.at.batch.micro_batch_rows)
    return teacher, scored.window_nats / config.at.batch.seq_len


def _describe(teacher: np.ndarray, reference: np.ndarray, best: np.ndarray) -> dict[str, Any]:
    def means(places: np.ndarray | slice) -> dict[str, float]:
        return {
            "teacher_nats": round(float(teacher[places].mean()), 6),
            "reference_nats": round(float(reference[places].mean()), 6),
        }

    return {"chosen": means(best), "all": means(slice(None))}
