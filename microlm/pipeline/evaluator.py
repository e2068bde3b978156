"""What is measured during training: the same validation windows and HellaSwag questions at every point of every arm.

Several processes deal the batches among them, and every one gets the figures of one process, bit for bit. Blocks stay
eager on CUDA too: compiled ones round at other places, and a curve's last point is to be what stage `evaluate` finds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.evaluation.answers import answers, curve_figures
from microlm.evaluation.encoding import Encoded, encode
from microlm.evaluation.engine import score
from microlm.evaluation.prompts import questions
from microlm.evaluation.sources import DataNotAvailable, read_rows
from microlm.evaluation.tasks import stratified_subset, task_named
from microlm.evaluation.validation import loss_on, validation_loss
from microlm.model import StudentLM
from microlm.scale import BatchConfig, OptimizationConfig
from microlm.training.telemetry import Evaluation

TASK, PROTOCOL = "hellaswag", "completion"


@dataclass
class Evaluator:
    training: TokenShards
    validation: TokenShards
    byte_lengths: np.ndarray
    encoded: list[Encoded]
    batch: BatchConfig
    validation_windows: int

    @classmethod
    def build(
        cls,
        training: TokenShards,
        shards: Path,
        tokenizer: Tokenizer,
        batch: BatchConfig,
        config: OptimizationConfig,
        context: int,
    ) -> "Evaluator":
        task = task_named(TASK)
        try:
            asked = questions(task, PROTOCOL, read_rows(task, None, hub=False))
        except DataNotAvailable as missing:
            raise UserError(missing.reason) from None
        chosen = stratified_subset(asked, config.hellaswag_items)
        encoding = encode(chosen, tokenizer, context, tokenizer.eot_id, joint=False)
        return cls(
            training,
            TokenShards(shards, "val"),
            tokenizer.byte_lengths,
            encoding.questions,
            batch,
            config.validation_windows,
        )

    def __call__(self, model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seq_len, rows = self.batch.seq_len, self.batch.micro_batch_rows
        seen = validation_loss(
            model, self.validation, self.byte_lengths, seq_len, self.validation_windows, rows, together=True
        )
        train_nats = None
        if train_windows is not None:
            train_nats = loss_on(
                model, self.training, self.byte_lengths, seq_len, train_windows, rows, together=True
            ).nats
        return Evaluation(train_nats, seen.nats, seen.bpb, self._hellaswag(model, max(rows * seq_len, 2048)))

    def _hellaswag(self, model: StudentLM, batch_tokens: int) -> dict[str, float]:
        nats = score(model, self.encoded, batch_tokens, backend="tree", together=True)
        lengths = [np.array([len(ending) for ending in item.endings]) for item in self.encoded]
        return curve_figures(answers([item.question for item in self.encoded], nats, lengths, None, PROTOCOL), PROTOCOL)
