"""The teacher run now, in place of its cache: what distillation without a cache has to pay in every step."""

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
from microlm.corpus.shards import TokenShards
from microlm.language_model import LanguageModel
from microlm.objective.definition import SparseTeacher
from microlm.teacher.cache import CacheIdentity, sparse_teacher
from microlm.teacher.capture import Recorder, records_of


def live_teacher(
    model: LanguageModel,
    record: Recorder,
    tables: Tensor,
    batch: Batch,
    temperature: float,
    device: torch.device | str = "cpu",
) -> SparseTeacher:
    """What the cache says of a batch, N = B * T rows, computed by running the teacher.

    It passes through the records of the capture, float16 log-probabilities and all: for a batch of the same composition
    the result equals `TeacherCache.teacher` bit for bit.

    Args:
        record: of the same model; its identity names the captured temperatures.
        tables: the cache's, or what `capture.tail_table` makes, [temperatures, V]. They are of no position.
        device: of the result.

    Raises:
        UserError: the teacher's logits are not finite, or the temperature is not one of the identity's.
    """
    records = records_of(model, record, batch, next(model.parameters()).device)
    return sparse_teacher(records, record.identity, tables, temperature, device)


class LiveTeacher:
    """Answers as `TeacherCache` does, of any windows of the shards, by running the model each time it is asked."""

    def __init__(
        self, model: LanguageModel, identity: CacheIdentity, tables: Tensor, shards: TokenShards, compiled: bool
    ) -> None:
        self.identity, self._tables = identity, tables
        self._model, self._record, self._shards = model, Recorder(model, identity, compiled), shards

    def teacher(self, windows: np.ndarray, temperature: float, device: torch.device | str = "cpu") -> SparseTeacher:
        """What the fused head wants of B windows, N = B * seq_len rows. UserError as `live_teacher`."""
        batch = read_batch(self._shards, windows, self.identity.seq_len)
        return live_teacher(self._model, self._record, self._tables, batch, temperature, device)
