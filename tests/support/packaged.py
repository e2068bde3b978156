"""What takes seconds to read from the packaged parts, read once: for tests of something else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import gguf
import pytest

from microlm.corpus.tokenizer import Tokenizer, build_tokenizer
from microlm.files import write_json
from tests.support.shared import made_once


def packaged_tokenizer(name: str, parts: Path) -> Tokenizer:
    """`smollm2`, `gpt2` or `olmo`: read by the first process that asks. Everyone gets one of their own."""

    def build(folder: Path) -> None:
        _, what_it_is_made_of = build_tokenizer(name, parts).__reduce__()
        write_json(folder / "tokenizer.json", what_it_is_made_of)

    return Tokenizer(*json.loads((made_once(f"tokenizer-{name}", build) / "tokenizer.json").read_text()))


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """A GGUF file is parsed once while the body runs: gguf takes seconds for the 49,152 tokens. What it gives is a view
    of the file, through which nothing can be written.
    """
    parsed = cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: parsed(path.resolve()))
        yield
