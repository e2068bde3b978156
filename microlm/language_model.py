"""What every language model is to the rest of MicroLM: hidden states first, logits only where they are needed."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class LanguageModel(Protocol):
    """A causal transformer, an `nn.Module`. B rows, T tokens, D hidden width, V size of the real vocabulary.

    The two halves are apart because the head is the dearest part of a small model: a caller runs it only on the
    positions whose predictions it reads.
    """

    n_vocab: int  # V: ids the tokenizer has, without the padding rows of the embedding
    context: int  # positions the model was built for; a row may be longer as long as its positions are below it
    training: bool
    head_weight: Tensor  # [at least V, D]; logits are its first V rows times the hidden state, and nothing more

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64, positions [B, T] int64 (None: 0..T-1), mask [B, 1, T, T] bool, True where the query
        (dim 2) may attend the key (dim 3) (None: causal) -> hidden states after the last norm [B, T, D].
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], padding rows of the embedding sliced off."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> nn.Module: ...
