"""What is measured during training: the same held-out windows and HellaSwag questions at every point of every training.

Several processes deal the batches among them, and every one gets the figures of one process, bit for bit. Blocks stay
eager on CUDA too: compiled ones round at other places, and a curve's last point is to be what stage `evaluate` finds.
"""

from dataclasses import dataclass

import numpy as np

from microlm.corpus.batches import evenly_spaced, window_count
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.evaluation.results.answers import answers, curve_figures
from microlm.evaluation.scoring.encoding import Encoded, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.scoring.held_out_loss import ValidationLoss, loss_on
from microlm.evaluation.tasks.data import DataNotAvailable, read_rows
from microlm.evaluation.tasks.prompts import questions
from microlm.evaluation.tasks.task import stratified_subset, task_named
from microlm.models.student import StudentLM
from microlm.parameters import BatchConfig
from microlm.training.history import Evaluation

TASK, PROTOCOL = "hellaswag", "completion"


def asked_questions(items: int, tokenizer: Tokenizer, context: int) -> list[Encoded]:
    """A fixed subset of `items` questions. UserError where they are not there."""
    task = task_named(TASK)
    try:
        asked = stratified_subset(questions(task, PROTOCOL, read_rows(task, None, hub=False)), items)
    except DataNotAvailable as missing:
        raise UserError(missing.reason) from None
    return encode(asked, tokenizer, context, tokenizer.eot_id, joint=False).questions


@dataclass
class Evaluator:
    training: TokenShards
    validation: TokenShards
    byte_lengths: np.ndarray
    encoded: list[Encoded]
    batch: BatchConfig
    validation_windows: int
    outside: TokenShards | None = None  # text of another kind, as many windows of it

    def __call__(self, model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seen = self._loss(model, self.validation)
        ood_bpb = self._loss(model, self.outside).bpb if self.outside else None
        train_nats = self._loss(model, self.training, train_windows).nats if train_windows is not None else None
        return Evaluation(train_nats, seen.nats, seen.bpb, self._hellaswag(model), ood_bpb)

    def _loss(self, model: StudentLM, shards: TokenShards, windows: np.ndarray | None = None) -> ValidationLoss:
        """On `windows`, or on evenly spaced ones."""
        seq_len, rows = self.batch.seq_len, self.batch.micro_batch_rows
        if windows is None:
            windows = evenly_spaced(window_count(shards, seq_len), self.validation_windows)
        return loss_on(model, shards, self.byte_lengths, seq_len, windows, rows, together=True)

    def _hellaswag(self, model: StudentLM) -> dict[str, float]:
        batch_tokens = max(self.batch.micro_batch_rows * self.batch.seq_len, 2048)
        nats = score(model, self.encoded, batch_tokens, backend="tree", together=True)
        lengths = [np.array([len(ending) for ending in item.endings]) for item in self.encoded]
        return curve_figures(answers([item.question for item in self.encoded], nats, lengths, None, PROTOCOL), PROTOCOL)
