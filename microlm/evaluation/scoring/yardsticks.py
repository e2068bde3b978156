"""The texts that models are scored on in bits per byte: the corpus's validation split, and text of another kind."""

from pathlib import Path

from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.parameters import ScaleConfig
from microlm.runtime.paths import OUTSIDE, SHARDS


def held_out(at: ScaleConfig, corpus: Path = SHARDS, outside: Path = OUTSIDE) -> dict[str, TokenShards]:
    """`val`, and `outside` where `evaluation.outside` names a text.

    Raises:
        UserError: one is absent, damaged, or `outside` is of another tokenizer than the corpus.
    """
    found = {"val": TokenShards(corpus, "val")}
    if at.evaluation.outside is None:
        return found
    found["outside"] = TokenShards(outside, "outside")
    if found["outside"].manifest["tokenizer"] != found["val"].manifest["tokenizer"]:
        raise UserError(f"{outside} is of another tokenizer than {corpus}; make it again with: dvc repro -f -s outside")
    return found
