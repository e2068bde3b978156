"""HellaSwag questions a second: the shared-context engine against one row at a time and against build-nanogpt's way.

    python -m bench.hellaswag [--shape laptop|smollm2] [--questions 64] [--rounds 2] [--threads N]

Same random weights, same questions, float32. build-nanogpt's way is its hellaswag.py: a question is one forward pass of
four padded rows, with the head and the loss on every position. Needs data/parts (dvc repro fetch).
"""

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from microlm.corpus.parts import PARTS_DIRECTORY, part_file
from microlm.corpus.tokenizer import build_tokenizer
from microlm.evaluation import tasks
from microlm.evaluation.engine import PackedItem, pack_items, score, score_plain
from microlm.model import ModelShape, StudentLM

BATCH_TOKENS = 8192
VOCAB = 49_152
SHAPES = {
    "laptop": ModelShape(VOCAB, VOCAB, 4, 256, 2, 128, 704, 1024, 10_000.0),
    "smollm2": ModelShape(VOCAB, VOCAB, 30, 576, 9, 64, 1536, 2048, 10_000.0),
}
NATS = [f"nats_{k}" for k in range(tasks.ENDINGS)]


@torch.inference_mode()
def build_nanogpt(model: StudentLM, packed: Sequence[PackedItem]) -> np.ndarray:
    """Summed loss of each ending [questions, 4]."""
    sums = np.empty((len(packed), tasks.ENDINGS))
    for row, item in enumerate(packed):
        lengths = [len(item.context) + len(ending) for ending in item.endings]
        tokens, mask = torch.zeros(tasks.ENDINGS, max(lengths), dtype=torch.int64), torch.zeros(4, max(lengths))
        for k, ending in enumerate(item.endings):
            tokens[k, : lengths[k]] = torch.from_numpy(np.concatenate([item.context, ending]))
            mask[k, len(item.context) : lengths[k]] = 1
        logits = model.logits(model.hidden(tokens))[:, :-1].contiguous()
        losses = F.cross_entropy(logits.view(-1, VOCAB), tokens[:, 1:].reshape(-1), reduction="none")
        sums[row] = (losses.view(tasks.ENDINGS, -1) * mask[:, 1:]).sum(1).numpy()
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="laptop")
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = StudentLM(SHAPES[given.shape]).eval()
    items = tasks.stratified_subset(tasks.hellaswag_items(part_file(tasks.PART, tasks.MEMBER)), given.questions)
    packed = pack_items(items, build_tokenizer("smollm2", PARTS_DIRECTORY), model.context)
    ways: dict[str, Callable[[Sequence[PackedItem]], np.ndarray]] = {
        "shared context": lambda some: score(model, some, BATCH_TOKENS)[NATS].to_numpy(),
        "one row at a time": lambda some: score_plain(model, some)[NATS].to_numpy(),
        "build-nanogpt": lambda some: build_nanogpt(model, some),
    }
    seconds, nats = dict.fromkeys(ways, 0.0), {}
    for way in ways.values():
        way(packed[:4])  # the first pass allocates
    for _ in range(given.rounds):  # the ways take turns, so that a busy moment of the machine meets all of them
        for name, way in ways.items():
            started = time.perf_counter()
            nats[name] = way(packed)
            seconds[name] += time.perf_counter() - started
    total = given.questions * given.rounds
    print(f"{given.shape} shape, {total} questions, float32, threads: {torch.get_num_threads()}")
    for name, spent in seconds.items():
        apart = np.abs(nats[name] - nats["shared context"]).max()
        ratio = spent / seconds["shared context"]
        print(f"{name:<18} {total / spent:6.2f} questions/s   shared context is {ratio:.2f}x   nats apart {apart:.1e}")


if __name__ == "__main__":
    main()
