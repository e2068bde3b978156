"""The teacher run in every step, in place of its cache."""

from torch import Tensor

from microlm.corpus.batches import Batch
from microlm.models.interface import LanguageModel
from microlm.objective.divergences import SparseTeacher
from microlm.teacher.cache import CacheIdentity, sparse_teacher
from microlm.teacher.capture import labels_of, recorder
from microlm.teacher.projection import Projection


class LiveTeacher:
    """Answers as `TeacherCache` does, of any windows, by running the model each time it is asked.

    It passes through the records of the capture, their rounding and all: for a batch of the same composition the answer
    equals the cache's bit for bit.

    Args:
        tables: the cache's, or what `capture.tail_table` makes, [temperatures, V]. They are of no position.
        projection: of a teacher with another tokenizer than the shards'.
    """

    def __init__(
        self,
        model: LanguageModel,
        identity: CacheIdentity,
        tables: Tensor,
        compiled: bool,
        projection: Projection | None = None,
    ) -> None:
        self.identity, self._tables = identity, tables
        self._model, self._record = model, recorder(model, identity, compiled, projection)

    def of_batch(self, batch: Batch, temperature: float) -> SparseTeacher:
        """What the fused head wants of B windows, N = B * seq_len rows, on the batch's device.

        Raises:
            UserError: the teacher's logits are not finite, or the temperature is not one of the identity's.
        """
        self._tables = self._tables.to(batch.tokens.device)  # once, as in cache.py
        labels = labels_of(self._model, self._record, batch)
        return sparse_teacher(labels.rows.to(batch.tokens.device), self.identity, self._tables, temperature)
