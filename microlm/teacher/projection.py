"""A teacher of another tokenizer, seen in the student's tokens.

The teacher reads the bytes of a window in tokens of its own. After a byte where both tokenizations have a boundary, its
next-token distribution is pushed forward to the student's ids:

    P_T(j) = sum over teacher tokens t with f(t) = j of softmax(z / T)_t

f(t) is the first of the student's tokens that spell t's bytes. f is total, so that no mass is lost.

A position is covered where the boundary is shared and f of the teacher's next token is the student's. Where the
student's token goes on beyond the teacher's (" 2019" against " "), P has the right answer's mass on a beginning of it,
and would teach the student to say that. So at a covered position P of the text's token is at least the teacher's own.

Shapes: B windows, L student tokens each, S teacher tokens in the longest of them, n covered positions, V ids of the
student, U of the teacher.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
from microlm.corpus.metaspace import TeacherTokenizer
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer
from microlm.evaluation.scoring.held_out_loss import ValidationLoss
from microlm.models.interface import LanguageModel
from microlm.objective.fused_head import token_nats

NO_TEXT = re.compile("([\udc80-\udcff]+)")  # what surrogateescape makes of bytes that are not UTF-8


def spell(tokenizer: TeacherTokenizer, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of any bytes: the text among them as the tokenizer cuts it, the rest merged as one word, or
    byte by byte where the tokenizer has byte fallback.

    A window begins and ends between any two bytes, so that a character may be cut in two. The tokenizer's normalizer is
    left out: it would change the bytes whose places are compared.

    Returns:
        Ids and the number of bytes up to the end of each. Bytes that the vocabulary lacks are counted and have no id.
    """
    runs = NO_TEXT.split(content.decode("utf-8", errors="surrogateescape"))  # text, rest, text, rest, ..., text
    ids = [
        tokenizer.encode_piece(run.encode("utf-8", errors="surrogateescape"))
        if i % 2
        else tokenizer.encode_as_it_is(run)
        for i, run in enumerate(runs)
        if run
    ]
    spelled = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64)
    ends = np.cumsum([len(tokenizer.bytes_of(token)) for token in spelled], dtype=np.int64)
    known = spelled < tokenizer.n_vocab
    return spelled[known], ends[known]


def first_student_tokens(teacher: TeacherTokenizer, student: Tokenizer) -> np.ndarray:
    """f, int64 [U]: the student's first token of each teacher token's bytes.

    A special token is the student's of the same spelling. Where the student has none, and for ids without text, it is
    end-of-text: what was being said ends there. So are bytes that the student's vocabulary lacks.
    """
    first = np.array([_first(student, teacher.bytes_of(token)) for token in range(teacher.n_vocab)], np.int64)
    for spelling, token in teacher.special_tokens.items():
        first[token] = student.special_tokens.get(spelling, student.eot_id)
    return first


def _first(student: Tokenizer, content: bytes) -> int:
    try:
        ids = student.encode_as_it_is(content.decode("utf-8"))
    except UnicodeDecodeError:  # a part of a character
        ids = student.encode_piece(content)
    return int(next((token for token in ids if token < student.n_vocab), student.eot_id))


@dataclass(frozen=True)
class Aligned:
    """Windows as the teacher reads them."""

    tokens: Tensor  # int64 [B, S], short rows filled up with end-of-text, which nothing before it sees
    targets: Tensor  # int64 [B, S], the token after each
    real: np.ndarray  # bool [B, S], the target is of the window: no filling
    shared: np.ndarray  # bool [B * L], positions after which both have a boundary
    covered: np.ndarray  # bool [B * L]
    states: Tensor  # int64 [n], places in the flattened tokens whose hidden states speak of the covered positions


class Projection:
    """From one tokenizer's distributions to another's.

    Attributes:
        first: f, int64 [U].
        n_vocab: V.
        teacher: the teacher's tokenizer.
    """

    def __init__(self, teacher: TeacherTokenizer, student: Tokenizer, context: int) -> None:
        """`context`: tokens that the teacher reads; what comes after them in a window is not covered."""
        self.teacher, self._student, self._context = teacher, student, context
        self.n_vocab = student.n_vocab
        self.first = torch.from_numpy(first_student_tokens(teacher, student))
        self._lengths = student.byte_lengths.astype(np.int64)
        self._lengths[student.eot_id] = 1  # in `_read` too: a boundary of its own
        self._sorted: dict[torch.device, tuple[Tensor, Tensor]] = {}  # of `first`, where it is summed in order

    def align(self, batch: Batch) -> Aligned:
        """The teacher's tokens of each window's text, its last target included, and where it covers the student's."""
        rows = batch.rows.cpu().numpy()
        read = [self._read(row) for row in rows]
        width = min(self._context, max(len(ids) for ids, _ in read) - 1)
        tokens = np.full((len(read), width + 1), self.teacher.eot_id, np.int64)
        real = np.zeros((len(read), width), bool)
        shared, covered = np.zeros((2, len(read), rows.shape[1] - 1), bool)
        states = []
        for b, (row, (ids, ends)) in enumerate(zip(rows, read)):
            ids, ends = ids[: width + 1], ends[: width + 1]
            tokens[b, : len(ids)], real[b, : len(ids) - 1] = ids, True
            after = np.cumsum(self._lengths[row])[:-1]
            place = np.searchsorted(ends[:-1], after)  # of the teacher's token that ends there; the last has no next
            found = place < len(ends) - 1
            found[found] = ends[place[found]] == after[found]
            shared[b] = covered[b] = found
            covered[b, found] = self.first.numpy()[ids[place[found] + 1]] == row[1:][found]
            states.append(b * width + place[covered[b]])
        tokens, targets, places = map(torch.tensor, (tokens[:, :-1], tokens[:, 1:], np.concatenate(states)))
        return Aligned(tokens, targets, real, shared.ravel(), covered.ravel(), places)

    def _read(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's ids of a window and the end of each, in bytes; an end-of-text token counts as one byte.

        What the teacher wants before every text is put at the window's begin alone, in the place of an end-of-text
        token that stands there: Gemma is worse for a second one.
        """
        ids, ends, at, begin = [], [], 0, self.teacher.begin
        opening, *documents = np.split(row, np.flatnonzero(row == self._student.eot_id))
        for i, piece in enumerate((opening, *documents)):
            special: tuple[int, ...] = begin if len(opening) else ()
            if i:  # the piece begins with an end-of-text token
                at, piece = at + 1, piece[1:]
                special = begin if begin and i == 1 and not len(opening) else (self.teacher.eot_id,)
            ids.append(special)
            ends.append([at] * len(special))
            content = b"".join(map(self._student.bytes_of, piece))
            spelled, spelled_ends = spell(self.teacher, content)
            ids.append(spelled)
            ends.append(at + spelled_ends)
            at += len(content)
        return np.concatenate(ids).astype(np.int64), np.concatenate(ends).astype(np.int64)

    def push(self, p: Tensor) -> Tensor:
        """Probabilities of the teacher's tokens [n, U] -> of the student's [n, V], their sums kept."""
        if p.device.type != "cuda" or not len(p):
            return p.new_zeros(len(p), self.n_vocab).index_add_(1, self.first.to(p.device), p)
        # index_add_ adds in the order in which threads come by there, and a capture has to give the same bytes again
        if p.device not in self._sorted:
            order = self.first.argsort(stable=True)
            counts = self.first.bincount(minlength=self.n_vocab)
            self._sorted[p.device] = (order.to(p.device), counts.to(p.device))
        return sum_sorted(p, *self._sorted[p.device])


def sum_sorted(p: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Sums of runs of the columns of p [n, U], taken in `order` [U], of the lengths `counts` [V] -> [n, V]."""
    return torch.segment_reduce(p.T[order], "sum", lengths=counts, axis=0).T


def native_loss(
    model: LanguageModel,
    projection: Projection,
    shards: TokenShards,
    seq_len: int,
    windows: np.ndarray,
    rows: int,
    progress: Callable[[int], object] = int,
) -> ValidationLoss:
    """The teacher's loss in its own tokens on the text of `windows`, as `held_out_loss.loss_on` counts.

    A window's first token of the teacher's is not predicted, and what is beyond its context neither.

    Args:
        progress: told the windows done.
    """
    device = next(model.parameters()).device

    def said() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(windows), rows):
            aligned = projection.align(read_batch(shards, windows[start : start + rows], seq_len))
            with torch.inference_mode():
                hidden = model.hidden(aligned.tokens.to(device)).flatten(0, 1)
                targets = aligned.targets.to(device).flatten()
                nats = token_nats(hidden, model.head_weight, targets, len(projection.first)).view(aligned.targets.shape)
            progress(len(aligned.real))
            yield aligned.real, -nats.double().cpu().numpy(), aligned.targets.numpy()

    return loss_of_gold(windows, said(), projection.teacher.byte_lengths)


def loss_of_gold(
    windows: np.ndarray, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], byte_lengths: np.ndarray
) -> ValidationLoss:
    """The loss where the teacher speaks.

    Args:
        parts: of the windows, in order: where it speaks, the log-probabilities of targets, and these, each [B, L].
        byte_lengths: int, of text behind each token.
    """
    nats, lengths, tokens = [], [], 0
    for covered, gold, targets in parts:
        nats.append(-np.where(covered, gold, 0).sum(-1, dtype=np.float64))
        lengths.append((byte_lengths[targets] * covered).sum(-1))
        tokens += int(covered.sum())
    return ValidationLoss(windows, np.concatenate(nats), np.concatenate(lengths).astype(np.int64), tokens)
