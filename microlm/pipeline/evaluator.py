"""What is measured during training: the same held-out windows and HellaSwag questions at every point of every arm.

Several processes deal the batches among them, and every one gets the figures of one process, bit for bit. Blocks stay
eager on CUDA too: compiled ones round at other places, and a curve's last point is to be what stage `evaluate` finds.
"""

from dataclasses import dataclass

import numpy as np

from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.evaluation.results.answers import answers, curve_figures
from microlm.evaluation.scoring.encoding import Encoded, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.scoring.held_out_loss import ValidationLoss, loss_on, validation_loss
from microlm.evaluation.tasks.data import DataNotAvailable, read_rows
from microlm.evaluation.tasks.prompts import questions, stratified_subset
from microlm.evaluation.tasks.task import task_named
from microlm.models.student import StudentLM
from microlm.parameters import BatchConfig, OptimizationConfig
from microlm.training.history import Evaluation

TASK, PROTOCOL = "hellaswag", "completion"


@dataclass
class Evaluator:
    training: TokenShards
    validation: TokenShards
    byte_lengths: np.ndarray
    encoded: list[Encoded]
    batch: BatchConfig
    validation_windows: int
    outside: TokenShards | None = None  # text of another kind, as many windows of it

    @classmethod
    def build(
        cls,
        training: TokenShards,
        held_out: dict[str, TokenShards],
        tokenizer: Tokenizer,
        batch: BatchConfig,
        config: OptimizationConfig,
        context: int,
    ) -> "Evaluator":
        """`held_out` as yardsticks.py reads it."""
        task = task_named(TASK)
        try:
            asked = questions(task, PROTOCOL, read_rows(task, None, hub=False))
        except DataNotAvailable as missing:
            raise UserError(str(missing)) from None
        chosen = stratified_subset(asked, config.hellaswag_items)
        encoding = encode(chosen, tokenizer, context, tokenizer.eot_id, joint=False)
        return cls(
            training,
            held_out["val"],
            tokenizer.byte_lengths,
            encoding.questions,
            batch,
            config.validation_windows,
            held_out.get("outside"),
        )

    @property
    def digests(self) -> list[str]:
        """Of the text that is held out."""
        return [shards.digest for shards in (self.validation, self.outside) if shards is not None]

    def __call__(self, model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seq_len, rows = self.batch.seq_len, self.batch.micro_batch_rows
        seen = self._held_out(model, self.validation)
        ood_bpb = None if self.outside is None else self._held_out(model, self.outside).bpb
        train_nats = None
        if train_windows is not None:
            train_nats = loss_on(
                model, self.training, self.byte_lengths, seq_len, train_windows, rows, together=True
            ).nats
        hellaswag = self._hellaswag(model, max(rows * seq_len, 2048))
        return Evaluation(train_nats, seen.nats, seen.bpb, hellaswag, ood_bpb)

    def _held_out(self, model: StudentLM, shards: TokenShards) -> ValidationLoss:
        seq_len, rows, windows = self.batch.seq_len, self.batch.micro_batch_rows, self.validation_windows
        return validation_loss(model, shards, self.byte_lengths, seq_len, windows, rows, together=True)

    def _hellaswag(self, model: StudentLM, batch_tokens: int) -> dict[str, float]:
        nats = score(model, self.encoded, batch_tokens, backend="tree", together=True)
        lengths = [np.array([len(ending) for ending in item.endings]) for item in self.encoded]
        return curve_figures(answers([item.question for item in self.encoded], nats, lengths, None, PROTOCOL), PROTOCOL)
