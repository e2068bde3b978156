"""What a model writes after a prompt: transformers' own `generate`, for whatever model the evaluator takes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.evaluation.candidates import Candidate, TransformersTokenizer
from microlm.models.model_files import as_transformers
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BROKEN = "\N{REPLACEMENT CHARACTER}"  # the bytes of a character whose other tokens are still to come


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, in transformers' words; None is what the model or transformers itself says."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def asked(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Continuation:
    """What was written: its text, how many tokens that took, and whether the model ended it itself."""

    text: str
    tokens: int
    ended: bool


class Writer:
    """A candidate that writes.

    A prompt is encoded as the model's training text is: of ours and of the packaged teacher an end-of-text token comes
    first, as before every document of the corpus; of others what their tokenizers put there, which may be nothing.
    Rows of the embedding that are no token are never written.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.name, self.context = candidate.name, candidate.model.context
        self._network, tokenizer = _network(candidate), candidate.tokenizer
        self._tokenizer = tokenizer
        self._begin = candidate.begin or ((tokenizer.eot_id,) if isinstance(tokenizer, Tokenizer) else ())
        stated = self._network.generation_config.eos_token_id
        stated = stated if isinstance(stated, list) else [stated]
        own = None if isinstance(tokenizer, TransformersTokenizer) else tokenizer.eot_id
        self._ends = sorted({token for token in (own, *stated) if token is not None})
        rows = self._network.get_output_embeddings().weight.shape[0]
        self._no_tokens = list(range(candidate.model.n_vocab, rows))

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt. UserError where there are none, or too many to write after them."""
        (ids,) = self._tokenizer.encode_batch([prompt])
        found = [*self._begin, *ids.tolist()]
        if not found:
            raise UserError(f"--prompt: is empty, and nothing begins a text of {self.name}; give it a word")
        if len(found) >= self.context:
            raise UserError(
                f"--prompt: takes {len(found)} tokens of {self.name}, which has {self.context} positions; shorten it"
            )
        return found

    def write(
        self, prompt: str, decoding: Decoding, seed: int = 0, hear: Callable[[str], object] = len
    ) -> Continuation:
        """Go on after `prompt`, up to the end of the model's positions.

        Args:
            seed: of sampling; what `transformers.set_seed` makes of it, so that `generate` gives the same tokens there.
            hear: gets each piece of text as soon as its characters are whole.

        Raises:
            UserError: as `encode`.
        """
        from transformers import set_seed

        ids = self.encode(prompt)
        stream = _Stream(self._decode, ids, hear)
        set_seed(seed)
        (row,) = self.generate([ids], decoding, streamer=stream)
        return self._continuation(ids, row)

    def write_each(self, prompts: Sequence[str], decoding: Decoding) -> list[Continuation]:
        """After all prompts in one batch, as many tokens as the longest leaves positions for; after one that leaves
        none, nothing."""
        rows = [[*self._begin, *ids.tolist()] for ids in self._tokenizer.encode_batch(prompts)]
        short = [ids for ids in rows if 0 < len(ids) < self.context]
        written = iter(self.generate(short, decoding) if short else ())
        return [self._continuation(ids, next(written) if 0 < len(ids) < self.context else []) for ids in rows]

    def generate(self, rows: Sequence[list[int]], decoding: Decoding, **asked: Any) -> list[list[int]]:
        """New ids after each row, with the id that ended it."""
        longest, device = max(map(len, rows)), self._network.device
        fill = self._ends[0] if self._ends else 0
        tokens = torch.tensor([[fill] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        settings = decoding.asked() | {"max_new_tokens": min(decoding.max_new_tokens, self.context - longest)}
        if self._no_tokens:
            settings["suppress_tokens"] = self._no_tokens
        if self._ends:
            settings["eos_token_id"] = self._ends
        with torch.inference_mode():
            found = self._network.generate(tokens, attention_mask=mask, pad_token_id=fill, **settings, **asked)
        return [self._cut(row) for row in found[:, longest:].tolist()]

    def _cut(self, new: list[int]) -> list[int]:
        """Without what fills a row up behind its end."""
        end = next((place for place, token in enumerate(new) if token in self._ends), len(new))
        return new[: end + 1]

    def _continuation(self, ids: list[int], new: list[int]) -> Continuation:
        ended = bool(new) and new[-1] in self._ends
        text = self._decode([*ids, *new])[len(self._decode(ids)) :]
        return Continuation(text, len(new) - ended, ended)

    def _decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        if isinstance(self._tokenizer, TransformersTokenizer):
            return self._tokenizer.decode(ids)
        return b"".join(map(self._tokenizer.bytes_of, ids)).decode("utf-8", errors="replace")


class _Stream:
    """transformers' streamer: text as soon as it is whole. The first ids that it is given are the prompt's."""

    def __init__(self, decode: Callable[[list[int]], str], ids: list[int], hear: Callable[[str], object]) -> None:
        self._decode, self._hear, self._ids, self._begun = decode, hear, ids, False
        self._told = len(decode(ids))

    def put(self, tokens: Tensor) -> None:
        if self._begun:
            self._ids = [*self._ids, *tokens.flatten().tolist()]
            self._tell(self._decode(self._ids).rstrip(BROKEN))
        self._begun = True

    def end(self) -> None:
        self._tell(self._decode(self._ids))

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            self._hear(text[self._told :])
            self._told = len(text)


def _network(candidate: Candidate) -> "PreTrainedModel":
    model = candidate.model
    if isinstance(model, StudentLM):
        return as_transformers(model, candidate.tokenizer.eot_id)
    assert isinstance(model, TransformersModel)
    return model.network
