"""Every method at every k against the dense gradient, position by position and summed over a step.

Two criteria, since methods fail in two ways. Position by position: how far a row's gradient is from the exact one. Over
a step: the gradient of the LM head's weight summed over many positions, sum_n g_n h_n^T, in which the noise of an
unbiased method averages out and a biased method's error stays.

The step's gradient [V, D] of each of hundreds of methods is not kept whole: the vocabulary is folded to `BUCKETS` rows
with random signs (count sketch; Charikar et al. 2002, doi:10.1016/S0304-3975(03)00400-6) and the hidden state is
projected to `WIDTH` random directions where it has more. Both keep the Frobenius norm on average.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Generator, Tensor

from microlm.research.probe.closed_form_gradients import TERMS, RowGradient, Target, forward_upper_bound, terms
from microlm.research.probe.dense_positions import DensePositions, TailModel
from microlm.research.probe.methods import METHODS, Method

KS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CHUNK = 64  # positions whose distributions exist at once
STEP_POSITIONS = 4096
BUCKETS, WIDTH = 256, 256
DIRECTIONS = ("forward", "reverse")
BASIS = ("q", "q log q", *DIRECTIONS, "f", "q log f")
OF_TERMS = [BASIS.index(term) for term in TERMS]
BRACKET_NATS = 1e-3  # what rounding in the records may add to a bound
# of a table's columns: `listed` are mean listed entries, `value` and `exact_value` nats, `bias_nats` their difference,
# `lower_holds` and `upper_holds` shares of positions, `step_error` is over STEP_POSITIONS, `whole_error` over all
MEANS = ("value", "cosine", "relative_error", "norm_ratio", "lower_holds", "upper", "upper_holds")
COLUMNS = (
    *("method", "origin", "k", "direction", "bytes", "listed", "exact_value", *MEANS),
    *("bias_nats", "step_error", "whole_error"),
)


class CountSketch:
    """Folds rows over the vocabulary, and hidden states, to fewer numbers; linear, the same for every method."""

    def __init__(self, vocabulary: int, hidden_size: int, seed: int, device: torch.device | str) -> None:
        draws = Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (vocabulary,), generator=draws).mul(2).sub(1).to(device, torch.float64)
        projection = torch.randn(hidden_size, WIDTH, generator=draws) / WIDTH**0.5
        self._projection = (projection if hidden_size > WIDTH else torch.eye(hidden_size)).to(device)

    def fold(self, rows: Tensor) -> Tensor:
        """[..., V] -> [..., BUCKETS]: token j joins bucket j mod BUCKETS with its sign."""
        whole = len(self.signs) // BUCKETS * BUCKETS
        signs = self.signs[:whole].view(-1, BUCKETS)
        folded = (rows[..., :whole].unflatten(-1, (-1, BUCKETS)) * signs).sum(-2)
        folded[..., : len(self.signs) - whole] += rows[..., whole:] * self.signs[whole:]
        return folded

    def fold_entries(self, ids: Tensor, values: Tensor) -> Tensor:
        """Ids and values [N, m] of rows that are zero elsewhere -> [N, BUCKETS]."""
        folded = values.new_zeros(len(ids), BUCKETS)
        return folded.scatter_add_(-1, ids % BUCKETS, values * self.signs[ids])

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, at most WIDTH]."""
        return hidden.float() @ self._projection


@dataclass
class Sums:
    """Over positions, of one method, k and direction, or of a direction's exact gradient."""

    numbers: Tensor | float = 0.0  # [c]
    step: Tensor | float = 0.0  # sketched gradient of the head's weight, since the last step's end
    whole: Tensor | float = 0.0  # of all steps that have ended
    norms: list[float] = field(default_factory=list)  # of each of these

    def add(self, numbers: Tensor, folded: Tensor, hidden: Tensor) -> None:
        """numbers [N, c]; folded [N, BUCKETS]; hidden as `CountSketch.project` gives it."""
        self.numbers = self.numbers + numbers.sum(0)
        self.step = self.step + folded.float().T @ hidden

    def end_step(self) -> None:
        self.norms.append(float(self.step.norm()))
        self.whole, self.step = self.whole + self.step, 0.0

    def relative(self, exact: "Sums", steps: int) -> tuple[float, float]:
        """Norms over those of `exact`: mean over the first `steps` steps, and of the sum over everything."""
        ratios = [error / true for error, true in zip(self.norms, exact.norms)][:steps]
        return sum(ratios) / len(ratios), float(self.whole.norm() / exact.whole.norm())


class Reference:
    """The dense gradients of one chunk, and moments that give a method's error without a dense pass of its own.

    But for its listed entries every row is a combination of a few dense rows: `BASIS`, of which two are the shape's.
    """

    def __init__(self, at: DensePositions, sketch: CountSketch) -> None:
        self._at, self._sketch = at, sketch
        exact = torch.stack([at.exact[direction][1] for direction in DIRECTIONS], 1)
        self._fixed = torch.cat((terms(at, "student"), exact), 1)  # [N, 4, V]
        self._fixed_gram = self._fixed @ self._fixed.mT
        self._fixed_folded = sketch.fold(self._fixed)
        self._take(self._fixed[:, :2], "student")

    def _take(self, own: Tensor, shape: str) -> None:
        self._shape, self._own = shape, own
        across = own @ self._fixed.mT  # [N, 2, 4]
        rows = torch.cat((self._fixed_gram, across.mT), 2), torch.cat((across, own @ own.mT), 2)
        self._gram = torch.cat(rows, 1)  # [N, 6, 6]
        self._folded = torch.cat((self._fixed_folded, self._sketch.fold(own)), 1)

    def folded(self, direction: str) -> Tensor:
        """The exact gradient, folded, [N, BUCKETS]."""
        return self._folded[:, BASIS.index(direction)]

    def compare(self, target: Target, rows: Mapping[str, RowGradient]) -> Iterator[tuple[Tensor, ...]]:
        """Cosine [N], relative error [N], ratio of norms [N] and folded error [N, BUCKETS] of each direction's row."""
        if target.shape != self._shape:
            self._take(terms(self._at, target.shape), target.shape)
        # the basis at the target's entries [N, 6, m], 0 where not listed, and the moments of all other tokens [N, 6, 6]
        listed = torch.cat([dense.take_along_dim(target.ids[:, None], 2) for dense in (self._fixed, self._own)], 1)
        listed *= target.listed[:, None]
        rest = self._gram - listed @ listed.mT
        for direction, row in rows.items():
            which = BASIS.index(direction)
            unlisted = row.coefficients.new_zeros(len(row.value), len(BASIS))
            unlisted[:, OF_TERMS] = row.coefficients
            error = unlisted.clone()
            error[:, which] -= 1
            values, wanted = torch.where(target.listed, row.entries, 0.0), listed[:, which]
            square = _quadratic(error, rest) + (values - wanted).square().sum(-1)
            inner = (unlisted[:, None] @ rest)[:, 0, which] + (values * wanted).sum(-1)
            norm = (_quadratic(unlisted, rest) + values.square().sum(-1)).clamp_min(0).sqrt()
            tiny = torch.finfo(norm.dtype).tiny
            exact = self._gram[:, which, which].sqrt().clamp_min(tiny)
            correction = values - (unlisted[:, None] @ listed)[:, 0]
            folded = (error[:, None] @ self._folded)[:, 0] + self._sketch.fold_entries(target.ids, correction)
            yield inner / (norm * exact).clamp_min(tiny), square.clamp_min(0).sqrt() / exact, norm / exact, folded


def _quadratic(vector: Tensor, matrix: Tensor) -> Tensor:
    return (vector[:, None] @ matrix @ vector[:, :, None])[:, 0, 0]


class Probe:
    """Sums over positions, chunk by chunk; `table` makes means of them."""

    def __init__(
        self, tails: TailModel, hidden_size: int, seed: int, ks: Sequence[int] = KS, methods: Sequence[Method] = METHODS
    ) -> None:
        """tails: of the teacher; hidden_size: the student's."""
        vocabulary, device = len(tails.log_table), tails.log_table.device
        self.positions = self._in_step = self._full_steps = 0
        self._tails = tails
        self._sketch = CountSketch(vocabulary, hidden_size, seed, device)
        self._draws = Generator(device).manual_seed(seed)
        self._cells = [(method, k) for method in methods for k in method.ks or ks if k <= vocabulary]
        self._sums: defaultdict[tuple, Sums] = defaultdict(Sums)

    def add(self, teacher: Tensor, student: Tensor, teacher_hidden: Tensor, student_hidden: Tensor) -> None:
        """Logits [N, V] and hidden states [N, D] of both at N positions, at best `CHUNK` of them."""
        log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
        at = DensePositions(log_p, log_q, teacher_hidden, self._tails)
        hidden, reference = self._sketch.project(student_hidden), Reference(at, self._sketch)
        for direction, (value, _) in at.exact.items():
            self._sums[(direction,)].add(value[:, None], reference.folded(direction), hidden)
        for method, k in self._cells:
            target = method.keep(at, k, self._draws)
            rows = {direction: read(target, at) for direction, read in method.read.items()}
            for (direction, row), (*numbers, folded) in zip(rows.items(), reference.compare(target, rows)):
                bracket = _bracket(row.value, target, k, at, direction) if method.bracket else ()
                columns = torch.stack((target.listed.sum(-1), row.value, *numbers, *bracket), -1)
                self._sums[method.name, k, direction].add(columns, folded, hidden)
        self.positions += len(teacher)
        self._in_step += len(teacher)
        if self._in_step >= STEP_POSITIONS:
            self._end_step()
            self._full_steps += 1

    def _end_step(self) -> None:
        for sums in self._sums.values():
            sums.end_step()
        self._in_step = 0

    def table(self) -> pd.DataFrame:
        """One row a method, k and direction; see `COLUMNS`."""
        if self._in_step:
            self._end_step()
        full_steps = max(1, self._full_steps)  # what is left over is no whole step, unless it is all there is
        rows = []
        for method, k in self._cells:
            for direction in method.read:
                sums, exact = self._sums[method.name, k, direction], self._sums[(direction,)]
                listed, *means = (sums.numbers / self.positions).tolist()
                exact_value, size = float(exact.numbers / self.positions), method.token_bytes(k, listed)
                errors = (means[0] - exact_value, *sums.relative(exact, full_steps))
                means += [None] * (len(MEANS) - len(means))
                rows.append((method.name, method.origin, k, direction, size, listed, exact_value, *means, *errors))
        return pd.DataFrame(rows, columns=COLUMNS)


def _bracket(lower: Tensor, target: Target, k: int, at: DensePositions, direction: str) -> tuple[Tensor, ...]:
    """[N] each: whether the lower bound holds; of forward KL also the upper bound, and whether it holds."""
    exact = at.exact[direction][0]
    holds = (lower <= exact + BRACKET_NATS).to(lower.dtype)
    if direction == "reverse":  # a teacher that the cache allows may leave a token no mass: there is no upper bound
        return (holds,)
    upper = forward_upper_bound(target, k, at)
    return holds, upper, (upper >= exact - BRACKET_NATS).to(upper.dtype)
