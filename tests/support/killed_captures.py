"""Captures that the kernel kills until the last one ends: python -m tests.support.killed_captures CORPUS TOP.

It writes the folders `warm` and `whole`, of captures left alone, and `killed`; and prints how many were killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from microlm.corpus.batches import evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.teacher import cache
from microlm.teacher.capture import capture
from microlm.teacher.recorders import Recorder

N_VOCAB, SEQ_LEN = 50257, 64


def main(corpus: Path, top: Path) -> None:
    torch.set_num_threads(1)
    cache.SMALLEST_BLOCK = SEQ_LEN * 4 * 50
    shards = TokenShards(corpus, "train")
    model = StudentLM(ModelShape(N_VOCAB, 50304, 2, 32, 2, 16, 64, 256, 1e4), seed=0).eval()
    identity = cache.CacheIdentity("tiny", None, "", N_VOCAB, shards.digest, SEQ_LEN, 12, 8, (1.0, 2.0))
    assert len(identity.blocks()) == 3

    def run(name: str) -> None:
        (top / name).mkdir(exist_ok=True)
        windows = evenly_spaced(14, 12)
        capture(Recorder(model, identity, compiled=False), shards, windows, top / name, 2, lambda tokens: None)

    run("warm")
    began = time.perf_counter()
    run("whole")
    lasted_s = time.perf_counter() - began
    killed = 0
    for attempt in range(8):
        child = os.fork()
        if not child:
            run("killed")
            os._exit(0)
        time.sleep(random.Random(attempt).uniform(0, 0.7) * lasted_s)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    run("killed")
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
