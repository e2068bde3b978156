"""Tokenizers small enough to enumerate, and random teachers of several architectures."""

import json
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
)

from microlm.corpus.tokenizer import END_OF_TEXT, Tokenizer
from microlm.corpus.tokenizer_format import ALPHABET, BYTE_LEVEL, byte_level_definition

CHARACTER = {byte: character for character, byte in ALPHABET.items()}
LETTERS = b"abc \xc3\xa9"  # the last two are the letter that is spelled in two bytes


def toy_tokenizer(name: str, merged: list[str], special: tuple[str, ...] = (END_OF_TEXT,)) -> Tokenizer:
    """Six bytes, then `merged` in this order ("ab" joins what is there of it), then the special tokens."""
    vocab = {CHARACTER[byte]: token for token, byte in enumerate(LETTERS)}
    merges = []
    for word in merged:
        spelled = "".join(CHARACTER[byte] for byte in word.encode())
        cut = next(i for i in range(1, len(spelled)) if spelled[:i] in vocab and spelled[i:] in vocab)
        merges.append(f"{spelled[:cut]} {spelled[cut:]}")
        vocab[spelled] = len(vocab)
    specials = {spelling: len(vocab) + i for i, spelling in enumerate(special)}
    return Tokenizer(name, byte_level_definition(vocab | specials, merges, specials, BYTE_LEVEL), name)


def first_merges(tokenizer: Tokenizer, kept: int) -> Tokenizer:
    """GPT-2's tokenizer without its last merges: the same bytes in other tokens."""
    definition = json.loads(json.dumps(tokenizer._definition))
    vocab = {text: token for text, token in definition["model"]["vocab"].items() if token < 256 + kept}
    definition["model"] |= {"vocab": vocab, "merges": definition["model"]["merges"][:kept]}
    definition["added_tokens"][0]["id"] = vocab[END_OF_TEXT] = 256 + kept
    return Tokenizer("other", definition, "test")


SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def random_network(kind: str, rows: int, context: int = 64) -> PreTrainedModel:
    """`gpt2`, `llama` or `olmo` in little; an embedding of `rows` rows, predictions clearly apart."""
    torch.manual_seed(len(kind))
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=rows, n_positions=context, n_embd=16, n_layer=2, n_head=2, initializer_range=0.7,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    shape = {**SHAPE, "vocab_size": rows, "max_position_embeddings": context, "initializer_range": 0.7}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if kind == "olmo":
        return OlmoForCausalLM(OlmoConfig(**shape)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def write_teacher(directory: Path, kind: str, tokenizer: Tokenizer, padding: int) -> PreTrainedModel:
    """A Hugging Face directory whose embedding has `padding` rows more than the tokenizer has ids."""
    network = random_network(kind, tokenizer.n_vocab + padding)
    network.save_pretrained(directory)
    tokenizer.save(directory, model_max_length=64)
    return network
