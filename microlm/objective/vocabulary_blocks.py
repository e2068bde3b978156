"""The logits z of N tokens as a stream of blocks over the vocabulary, and what a first sweep over them finds.

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids, G groups of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from microlm.runtime import compilation

GROUP = 64  # neighbouring ids of which a row keeps the largest logit; a block holds whole groups
LOWEST = -1e30  # below any logit, and finite, so that no difference of infinities arises
COLUMNS = 256  # of which a block's width is a multiple, where it is not the whole vocabulary
SPARE = 8  # columns beside a block on CUDA: they take what belongs elsewhere, and 16 bytes keep rows aligned


@dataclass(frozen=True)
class Sizes:
    """How logits are held on one kind of device.

    Attributes:
        block: elements of one block.
        kept: elements that stay from one sweep to the next, where all of them are no more.
        widest: columns of a block.
        whole_passes: a pass over a whole block costs less than to find out which part of it matters. Then no list of
            tokens is made whose length the host would have to wait for.
    """

    block: int
    kept: int
    widest: int
    whole_passes: bool


SIZES = {
    # a block of 8 MiB in bfloat16 stays in the processor's cache
    "cpu": Sizes(2**22, 2**28, 16384, whole_passes=False),
    # below 2^31, where kernels still count in 32 bits; 65,536 tokens of a vocabulary of 50,304 keep 6.6 GB
    "cuda": Sizes(2**30, 2**32, 2**20, whole_passes=True),
}


@dataclass(frozen=True)
class Layout:
    """Of the logits [N, V] of one call of the head."""

    width: int  # columns of a block; the last one may be narrower
    row: int  # elements from one row of a block to the next, at its widest
    kept: bool

    @property
    def whole_passes(self) -> bool:
        """As in `Sizes`. Then there are columns beside a block."""
        return self.row > self.width

    def elements(self, n_rows: int, n_vocab: int) -> int:
        """Of all logits that exist at once."""
        blocks = -(-n_vocab // self.width) if self.kept else 1
        return n_rows * blocks * self.row if self.whole_passes else n_rows * min(n_vocab, blocks * self.width)


def layout_of(n_rows: int, n_vocab: int, device: str, sweeps: bool = True) -> Layout:
    """For `n_rows` tokens on a kind of device. `sweeps`: several will come, so that keeping is of use."""
    sizes, rows = SIZES.get(device, SIZES["cpu"]), max(1, n_rows)
    kept = sweeps and rows * n_vocab <= sizes.kept
    if not sizes.whole_passes:
        width = max(COLUMNS, min(sizes.block // rows // COLUMNS * COLUMNS, sizes.widest))
        return Layout(width, width, kept)
    blocks = max(1, -(-rows * n_vocab // sizes.block), -(-n_vocab // sizes.widest))
    width = -(-n_vocab // blocks)  # as equal as whole multiples allow
    width = width if blocks == 1 else -(-width // COLUMNS) * COLUMNS
    return Layout(width, -(-width // SPARE) * SPARE + SPARE, kept)


_compiled = cache(torch.compile)  # each pass once, and not for one shape alone: evaluation brings others


def kernel(block_pass: Callable[..., None]) -> Callable[..., None]:
    """A pass over a block as this process runs it: as it is, or compiled to one read (and one write)."""
    return _compiled(block_pass) if compilation.enabled else block_pass


class Entries:
    """Single entries (row, id) of the [N, V] logits, grouped by the block of the vocabulary that holds them.

    Args:
        ids: int64 [N, k], or [M] where `rows` [M] says whose they are.
    """

    def __init__(self, ids: Tensor, blocks: "VocabularyBlocks", rows: Tensor | None = None) -> None:
        self._width, flat = blocks.layout.width, ids.reshape(-1)
        found, self._order = torch.sort(flat // self._width, stable=True)
        edges = torch.arange(-(-blocks.n_vocab // self._width) + 1, device=ids.device)
        self._edges = torch.searchsorted(found, edges).tolist()
        self._rows = self._order // ids.shape[1] if rows is None else rows[self._order]
        self._columns = flat[self._order] % self._width

    def _at(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns inside the block, and places in the flattened ids."""
        index = part.start // self._width
        chosen = slice(self._edges[index], self._edges[index + 1])
        return self._rows[chosen], self._columns[chosen], self._order[chosen]

    def read(self, part: slice, z: Tensor, into: Tensor) -> None:
        """The entries that lie in the block z of a `part` of the vocabulary, into their places, of the ids' shape."""
        r, c, places = self._at(part)
        into.view(-1)[places] = z[r, c].to(into.dtype)

    def write(self, part: slice, z: Tensor, values: Tensor | float) -> None:
        """Into a block z: one number, or each entry's own of `values`, of the ids' shape."""
        r, c, places = self._at(part)
        z[r, c] = values.reshape(-1)[places].to(z.dtype) if isinstance(values, Tensor) else values

    def subtract(self, part: slice, z: Tensor, amount: float) -> None:
        """`amount` from every entry in a block z."""
        r, c, _ = self._at(part)
        z[r, c] -= amount


class SpilledEntries:
    """`Entries` of [N, k] ids without a list by blocks, whose lengths the host would have to wait for.

    Every pass touches all entries: those of other blocks land in a column beside the block.
    """

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def _at(self, part: slice, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block with its spare columns, each entry's column there, and whether it is inside; [N, k] both."""
        columns = self._ids - part.start
        inside = (columns >= 0) & (columns < z.shape[1])
        wide = z.as_strided((z.shape[0], z.shape[1] + 1), z.stride())
        return wide, torch.where(inside, columns, z.shape[1]), inside

    def read(self, part: slice, z: Tensor, into: Tensor) -> None:
        wide, columns, inside = self._at(part, z)
        held = into.view(self._ids.shape)
        held.copy_(torch.where(inside, wide.gather(1, columns).to(into.dtype), held))

    def write(self, part: slice, z: Tensor, values: Tensor | float) -> None:
        wide, columns, _ = self._at(part, z)
        wide.scatter_(1, columns, values.view(columns.shape).to(z.dtype) if isinstance(values, Tensor) else values)

    def subtract(self, part: slice, z: Tensor, amount: float) -> None:
        wide, columns, _ = self._at(part, z)
        wide.scatter_(1, columns, wide.gather(1, columns) - amount)


AnyEntries = Entries | SpilledEntries


class VocabularyBlocks:
    """hidden [N, D] times weight [V, D], block by block.

    Args:
        keep: several sweeps will come. Where the logits are few enough the first one's blocks stay, and the others find
            them as they were left; otherwise each sweep makes them anew.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, n_vocab: int, keep: bool = False) -> None:
        self.hidden, self.n_vocab = hidden, n_vocab
        self.weight = weight[:n_vocab].to(hidden.dtype)
        self.exact = torch.promote_types(hidden.dtype, torch.float32)  # of sums
        self.layout = layout_of(len(hidden), n_vocab, hidden.device.type, keep)
        self._kept = _kept_memory(hidden, self.layout.elements(len(hidden), n_vocab)) if self.layout.kept else None
        self._made = False

    def entries(self, ids: Tensor) -> AnyEntries:
        """Of ids [N, k]."""
        return SpilledEntries(ids) if self.layout.whole_passes else Entries(ids, self)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Slice of the vocabulary and logits [N, block]; unless they are kept, the next block reuses the memory.

        A sweep may write into a block: the next one must make do with what it finds there.
        """
        n, made, row = len(self.hidden), self._made, self.layout.row
        memory = self.hidden.new_empty(n * row) if self._kept is None else self._kept
        for start in range(0, self.n_vocab, self.layout.width):
            part = slice(start, min(start + self.layout.width, self.n_vocab))
            first = 0 if self._kept is None else n * row * (start // self.layout.width)
            columns = part.stop - start
            z = memory.as_strided((n, columns), (row if self.layout.whole_passes else columns, 1), first)
            yield part, z if made else torch.mm(self.hidden, self.weight[part].T, out=z)
        self._made = self._kept is not None

    def no_mass(self) -> tuple[Tensor, Tensor]:
        """Peak and total of N online logsumexps that have seen nothing yet, as `update_statistics` takes them."""
        total = self.hidden.new_zeros(len(self.hidden), dtype=self.exact)
        return torch.full_like(total, LOWEST), total


_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _kept_memory(like: Tensor, elements: int) -> Tensor:
    """Room for kept logits, on the CPU the same in every call: fresh pages would cost a tenth of a training step.

    CUDA's allocator keeps it anyway, and lends it to others meanwhile.
    """
    if like.device.type == "cuda":
        return like.new_empty(elements)
    place = like.device, like.dtype
    if len(_memory.get(place, ())) < elements:
        _memory.pop(place, None)
        _memory[place] = like.new_empty(elements)
    return _memory[place]


@dataclass
class StudentRows:
    """What the first sweep finds of N rows. A row's tail is the vocabulary without the ids cached of its teacher."""

    blocks: VocabularyBlocks
    gold: AnyEntries  # the targets
    gold_logits: Tensor  # [N]
    log_normalizer: Tensor  # [N] logsumexp of z
    scale: float  # 1 / temperature
    ids: Tensor | None  # int64 [N, k], the cached ones, where there is a teacher
    cached: AnyEntries | None  # where they lie
    head: Tensor | None  # [N, k] z of the cached ids
    log_tail: Tensor  # [N] logsumexp of scale * z over the tail
    largest: Tensor | None  # [N, G] the largest scale * z of the tail in each group, where it was asked for

    @cached_property
    def tempered_normalizer(self) -> Tensor:
        """[N] logsumexp of scale * z."""
        return torch.logaddexp((self.head * self.scale).logsumexp(-1), self.log_tail)

    def tails(self) -> Iterator[tuple[slice, Tensor]]:
        """Another sweep, with -inf at the cached ids."""
        for part, z in self.blocks:
            self.cached.write(part, z, -torch.inf)
            yield part, z


def first_sweep(
    blocks: VocabularyBlocks, targets: Tensor, ids: Tensor | None = None, scale: float = 1.0, groups: bool = False
) -> StudentRows:
    """Of targets int64 [N] and, where there is a teacher, of cached ids int64 [N, k]; `groups`: with `largest`."""
    peak, total = blocks.no_mass()
    tail_peak, tail_total = (peak, total) if scale == 1 else blocks.no_mass()
    gold, gold_logits = blocks.entries(targets[:, None]), torch.zeros_like(peak)
    cached = head = largest = None
    if ids is not None:
        cached, head = blocks.entries(ids), torch.empty(ids.shape, dtype=blocks.exact, device=ids.device)
    if groups:
        largest = peak.new_empty(len(peak), -(-blocks.n_vocab // GROUP))
    for part, z in blocks:
        gold.read(part, z, gold_logits)
        if cached is not None:
            cached.read(part, z, head)
            cached.write(part, z, -torch.inf)  # what is left of the row is the tail
        if scale != 1:
            kernel(update_statistics)(z, 1.0, peak, total)
        if largest is None:
            kernel(update_statistics)(z, scale, tail_peak, tail_total)
        else:
            held = largest[:, part.start // GROUP : -(-part.stop // GROUP)]
            kernel(update_group_statistics)(z, scale, tail_peak, tail_total, held)
    log_normalizer, log_tail = peak + total.log(), tail_peak + tail_total.log()
    if head is not None:
        log_normalizer = torch.logaddexp(log_normalizer, head.logsumexp(-1))
    return StudentRows(blocks, gold, gold_logits, log_normalizer, scale, ids, cached, head, log_tail, largest)


def update_statistics(z: Tensor, scale: float, peak: Tensor, total: Tensor) -> None:
    """Online logsumexp of scale * z along rows: exp(peak) * total is the sum so far. In place on `peak` and `total`."""
    scaled = z.to(peak.dtype) * scale
    raised = torch.maximum(peak, scaled.amax(-1))
    total.copy_(total * torch.exp(peak - raised) + torch.exp(scaled - raised[:, None]).sum(-1))
    peak.copy_(raised)


def update_group_statistics(z: Tensor, scale: float, peak: Tensor, total: Tensor, largest: Tensor) -> None:
    """`update_statistics`, and into `largest` [N, groups] the largest of each group of scale * z."""
    padded = torch.nn.functional.pad(z, (0, -z.shape[1] % GROUP), value=-torch.inf)
    largest.copy_(padded.unflatten(1, (-1, GROUP)).amax(-1).to(peak.dtype) * scale)
    update_statistics(z, scale, peak, total)
