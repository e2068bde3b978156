"""HellaSwag questions a second: the shared-context engine against one row at a time and against build-nanogpt's way.

    python -m bench.hellaswag [--shape laptop|smollm2] [--shots 0] [--questions 64] [--rounds 2] [--threads N]

Same random weights, same questions, float32. build-nanogpt's way is its hellaswag.py: a question is one forward pass of
four padded rows, with the head and the loss on every position. Needs data/parts (dvc repro fetch).
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from microlm.corpus.parts import PARTS_DIRECTORY
from microlm.corpus.tokenizer import build_tokenizer
from microlm.evaluation.scoring.backends import padded, plan, row_length
from microlm.evaluation.scoring.encoding import Encoding, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.benchmarks import few_shot
from microlm.evaluation.tasks.data import read_rows
from microlm.evaluation.tasks.prompts import questions, stratified_subset
from microlm.evaluation.tasks.task import task_named
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.research.plan.estimate import config_of_scale

BATCH_TOKENS = 8192
VOCAB = 49_152
SHAPES = {
    "laptop": ModelShape(VOCAB, VOCAB, **vars(config_of_scale("laptop").at.model)),
    "smollm2": ModelShape(VOCAB, VOCAB, 30, 576, 9, 64, 1536, 2048, 10_000.0),
}
ENDINGS = 4


@torch.inference_mode()
def build_nanogpt(model: StudentLM, encoding: Encoding) -> np.ndarray:
    """Summed loss of each ending [questions, 4]."""
    sums = np.empty((len(encoding.questions), ENDINGS))
    for row, item in enumerate(encoding.questions):
        context = np.concatenate([encoding.prefix, item.context])
        lengths = [len(context) + len(ending) for ending in item.endings]
        tokens, mask = torch.zeros(ENDINGS, max(lengths), dtype=torch.int64), torch.zeros(ENDINGS, max(lengths))
        for k, ending in enumerate(item.endings):
            tokens[k, : lengths[k]] = torch.from_numpy(np.concatenate([context, ending]))
            mask[k, len(context) : lengths[k]] = 1
        logits = model.logits(model.hidden(tokens))[:, :-1].contiguous()
        losses = F.cross_entropy(logits.view(-1, VOCAB), tokens[:, 1:].reshape(-1), reduction="none")
        sums[row] = (losses.view(ENDINGS, -1) * mask[:, 1:]).sum(1).numpy()
    return sums


def tokens_read(encoding: Encoding) -> dict[str, float]:
    """Tokens that pass through the model for one question: with all shared, as padded; one row for each ending."""
    items, shared = encoding.questions, len(encoding.prefix)
    apart = [shared + len(q.context) + len(ending) - 1 for q in items for ending in q.endings]
    rows = np.array([row_length(q) for q in items])
    laid = sum(len(batch) * int(padded(rows[batch].max())) for batch in plan(items, BATCH_TOKENS))
    return {
        "shared": (shared + int(rows.sum())) / len(items),
        "shared and padded": (shared + laid) / len(items),
        "one row an ending": sum(apart) / len(items),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="laptop")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = StudentLM(SHAPES[given.shape]).eval()
    encoding = _encode(given.questions, given.shots, model.context)
    ways: dict[str, Callable[[Encoding], np.ndarray]] = {
        "shared context": lambda some: np.stack(score(model, some.questions, BATCH_TOKENS, some.prefix)),
        "one row at a time": lambda some: np.stack(score(model, some.questions, 1, some.prefix, backend="plain")),
        "build-nanogpt": lambda some: build_nanogpt(model, some),
    }
    seconds, nats = dict.fromkeys(ways, 0.0), {}
    for way in ways.values():
        way(Encoding(encoding.questions[:4], encoding.prefix))  # the first pass allocates
    for _ in range(given.rounds):  # the ways take turns, so that a busy moment of the machine meets all of them
        for name, way in ways.items():
            started = time.perf_counter()
            nats[name] = way(encoding)
            seconds[name] += time.perf_counter() - started
    total = given.questions * given.rounds
    print(f"{given.shape} shape, {total} questions, {given.shots}-shot, float32, threads: {torch.get_num_threads()}")
    print("tokens a question:", ", ".join(f"{name} {read:.0f}" for name, read in tokens_read(encoding).items()))
    for name, spent in seconds.items():
        apart = np.abs(nats[name] - nats["shared context"]).max()
        ratio = spent / seconds["shared context"]
        print(f"{name:<18} {total / spent:6.2f} questions/s   shared context is {ratio:.2f}x   nats apart {apart:.1e}")


def _encode(number: int, shots: int, context: int) -> Encoding:
    """As build-nanogpt asks, or with shots as lm-eval does: completion has none."""
    task, protocol = task_named("hellaswag"), "lm-eval" if shots else "completion"
    asked = stratified_subset(questions(task, protocol, read_rows(task, None, hub=False)), number)
    tokenizer = build_tokenizer("smollm2", PARTS_DIRECTORY)
    return encode(asked, tokenizer, context, tokenizer.eot_id, few_shot(task, protocol, shots), joint=shots > 0)


if __name__ == "__main__":
    main()
