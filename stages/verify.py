"""Is data/teacher the teacher's own? Replay random cached windows through the live teacher and compare every record.

    python -m stages.verify [--windows 16] [--seed 0] [--teacher MODEL] [--replay-only]

Not a stage of the pipeline: a question that a person may ask at any time. Ends with 1 where the answer is no.
"""

import argparse
from dataclasses import replace

import numpy as np

from microlm.config import load_config
from microlm.corpus.batches import cached_windows
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import OneLineParser, UserError, run_stage
from microlm.models.teacher_source import teacher_source
from microlm.research.verify import refuse_other, replay
from microlm.runtime.device import set_up
from microlm.runtime.paths import CACHE, SHARDS
from microlm.runtime.terminal import banner, progress_bar, waiting
from microlm.teacher.cache import TeacherCache, cache_identity
from microlm.teacher.recorders import load_recorder


def arguments() -> argparse.Namespace:
    parser = OneLineParser(
        "python -m stages.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=16, help="how many cached windows to replay")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--teacher", metavar="MODEL", help="replay this teacher, not the one of params.yaml")
    parser.add_argument("--replay-only", action="store_true", help="do not compare the weights' sha256")
    given = parser.parse_args()
    for name, least in (("windows", 1), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name}: {getattr(given, name)} is less than {least}")
    return given


def main() -> None:
    given, config = arguments(), load_config()
    if config.at.teacher.source == "live":
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.source: live writes no records, so there are none to verify"
        )
    shards = TokenShards(SHARDS, "train")
    windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    identity = cache_identity(config.at.teacher, config.at.batch.seq_len, shards)
    if given.teacher or given.replay_only:
        identity = replace(identity, weights_sha256=None)
    cache = TeacherCache(CACHE, identity, windows)
    asked = replace(config.at.teacher, model=given.teacher, revision=None) if given.teacher else config.at.teacher
    runtime = replace(set_up(config.at.runtime), dtype=cache.dtype)
    tokenizer = load_tokenizer(SHARDS / "tokenizer")
    with config.naming_keys():
        source, of_teacher = teacher_source(asked), replace(identity, teacher=asked.model)
        with waiting(f"verify: reading {asked.model}"):
            record = load_recorder(source, of_teacher, runtime, tokenizer)
    own = record.projection.teacher.fingerprint if record.projection else None  # none where it is the corpus's
    refuse_other(cache, "teacher_tokenizer", own, CACHE, asked.model)
    if not given.replay_only:
        alone = ", or compare by replay alone with --replay-only"
        refuse_other(cache, "weights_sha256", source.fingerprint(record.model), CACHE, asked.model, alone)
    chosen = np.sort(np.random.default_rng(given.seed).choice(windows, min(given.windows, len(windows)), replace=False))
    with progress_bar(len(chosen) * identity.seq_len, 0, "tok", "verify") as bar:
        found = replay(record.model, cache, shards, chosen, asked.batch_rows, bar.update, record.projection)
    banner(f"verify: {len(chosen)} of {len(windows):,} cached windows, {asked.model}", found.lines(cache.dtype))
    found.refuse_excess(cache.dtype, CACHE, asked.model)


if __name__ == "__main__":
    run_stage(main)
