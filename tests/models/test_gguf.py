"""Promises of a GGUF file: it holds the model's very weights and tokenizer, and llama.cpp writes what we write."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from microlm.corpus.tokenizer import AWKWARD_TEXTS, END_OF_TEXT, Tokenizer, load_tokenizer, smollm2_tokenizer
from microlm.corpus.tokenizer_format import BYTE_LEVEL, DIGITS, KNOWN_PATTERNS
from microlm.errors import UserError
from microlm.evaluation.samples import PROMPTS as SAMPLED
from microlm.models.architecture import FAMILIES, ModelShape, RopeScaling
from microlm.models.gguf_export import AS_WIDE, write_gguf
from microlm.models.gguf_format import halves_apart, halves_interleaved
from microlm.models.gguf_models import GgufFile
from microlm.models.model_files import as_transformers, load_student
from microlm.models.student import StudentLM
from tests.support.clones import ROOT
from tests.support.llama_cpp import NEEDED, Question, asked
from tests.support.soak import LONG
from tests.support.workspace import short_tokenizer

PADDING, STUDENT = 7, ROOT / "models" / "student"
SLOWED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def tiny(family: str, tokenizer: Tokenizer, **beside: object) -> StudentLM:
    """Two layers, 32 wide, two heads of queries to one of keys; every parameter of it random, norms and biases too."""
    head = 16 if family in AS_WIDE else 12
    shape = ModelShape(
        tokenizer.n_vocab, tokenizer.n_vocab + PADDING, 2, 32, 2, head, 48, 256, 10000.0, kv_heads=1, family=family
    )
    model = StudentLM(replace(shape, **beside))
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim < 2), std=0.3)
    return model.eval()


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"tied": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": SLOWED}),
    ("qwen3", {"tied": False, "kv_heads": 2}),
]
NAMES = [" ".join((family, *beside)) for family, beside in VARIANTS]


@pytest.mark.parametrize(("family", "beside"), VARIANTS, ids=NAMES)
def test_a_student_for_transformers_has_the_students_logits(family: str, beside: dict[str, object]) -> None:
    model, tokens = tiny(family, short_tokenizer(), **beside), torch.arange(40)[None]
    with torch.inference_mode():
        theirs = as_transformers(model, 0)(tokens).logits[..., : model.n_vocab]
        torch.testing.assert_close(theirs, model.logits(model.hidden(tokens)), rtol=0, atol=1e-4)


def expected(model: StudentLM) -> dict[str, np.ndarray]:
    """transformers' own tensors, those of a llama's rotations reordered index by index."""
    shape, found = model.shape, {}
    for name, tensor in as_transformers(model, 0).state_dict().items():
        values = tensor.numpy().copy()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name.startswith("lm_head") and shape.tied and shape.family != "olmo2":
                continue  # llama.cpp takes the embedding
            values = values[: shape.n_vocab]
        if shape.family in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
            half, source = shape.head_dim // 2, values.copy()
            for row in range(len(values)):
                head, place = divmod(row, shape.head_dim)
                values[row] = source[head * shape.head_dim + place % 2 * half + place // 2]
        found[name] = values
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("family", "beside"), VARIANTS, ids=NAMES)
def test_a_file_reads_back_to_the_same_tensors(
    family: str, beside: dict[str, object], dtype: str, tmp_path: Path
) -> None:
    model = tiny(family, short_tokenizer(), **beside)
    write_gguf(tmp_path / "model.gguf", model, short_tokenizer(), "tiny", dtype)
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in read.tensors}
    architecture = "llama" if family == "mistral" else family
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 2)
    assert read.fields["general.architecture"].contents() == architecture
    for name, values in expected(model).items():
        there = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        wanted = torch.from_numpy(values)
        if wanted.ndim > 1:
            wanted = wanted.to(getattr(torch, dtype)).float()
        np.testing.assert_array_equal(there, wanted.numpy(), err_msg=name)
    assert set(stored) == ({"rope_freqs.weight"} if model.shape.rope_scaling else set())


def test_a_llama_that_was_written_is_read_to_the_same_logits(tmp_path: Path) -> None:
    model = tiny("llama", short_tokenizer(), kv_heads=2, head_dim=16)
    write_gguf(tmp_path / "model.gguf", model, short_tokenizer(), "tiny", "float32")
    read, tokens = GgufFile(tmp_path / "model.gguf").network(torch.float32), torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(read(tokens).logits, model.logits(model.hidden(tokens)), rtol=0, atol=1e-5)


@given(heads=st.integers(1, 5), pairs=st.integers(1, 6), columns=st.integers(0, 3))
def test_interleaving_pairs_what_turns_together_and_is_undone(heads: int, pairs: int, columns: int) -> None:
    rows = torch.arange(heads * 2 * pairs * max(1, columns)).view(heads * 2 * pairs, *([columns] if columns else []))
    mixed = halves_interleaved(rows, heads)
    for head in range(heads):
        for pair in range(pairs):
            at = head * 2 * pairs
            assert torch.equal(mixed[at + 2 * pair], rows[at + pair])
            assert torch.equal(mixed[at + 2 * pair + 1], rows[at + pairs + pair])
    assert torch.equal(halves_apart(mixed, heads), rows)


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_gguf(tmp_path / name, tiny("qwen3", short_tokenizer()), short_tokenizer(), "tiny", licence="mit")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    said = gguf.GGUFReader(tmp_path / "one").fields
    assert said["general.license"].contents() == "mit" and said["qwen3.context_length"].contents() == 256


def with_gaps() -> Tokenizer:
    """Ids that nothing has between the last merge and the added tokens, one of which is ordinary."""
    definition = short_tokenizer(300)._definition
    model, end = definition["model"], max(definition["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": end + 5, "content": END_OF_TEXT, **flags, "special": True},
        {"id": end + 9, "content": "<note>", **flags, "special": False},
    ]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
    return Tokenizer("gaps", definition | {"model": model | {"vocab": vocab}, "added_tokens": added}, "test")


def test_an_id_that_nothing_has_is_unused_and_an_added_one_keeps_its_kind(tmp_path: Path) -> None:
    tokenizer = with_gaps()
    write_gguf(tmp_path / "model.gguf", tiny("llama", tokenizer), tokenizer, "tiny")
    said = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, kinds = (said[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(set(tokens)) == len(kinds) == tokenizer.n_vocab
    unused = [token for token, kind in enumerate(kinds) if kind == gguf.TokenType.UNUSED]
    assert unused == [i for i in range(tokenizer.n_vocab) if not tokenizer.bytes_of(i) and i != tokenizer.eot_id]
    assert len(unused) > 3
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [END_OF_TEXT]
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED] == ["<note>"]


def cut_by(pre_tokenizer: dict[str, object]) -> Tokenizer:
    """The short tokenizer's merges after other cuts."""
    definition = short_tokenizer(300)._definition
    return Tokenizer("cut", definition | {"pre_tokenizer": pre_tokenizer}, "test")


def split_by(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


CUTS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    **dict(zip(("llama-bpe", "qwen2", "gpt-4o"), map(split_by, KNOWN_PATTERNS), strict=True)),
}


def test_a_tokenizer_is_read_back_as_the_same(tmp_path: Path) -> None:
    tokenizer = cut_by(CUTS["smollm"])
    write_gguf(tmp_path / "model.gguf", tiny("llama", tokenizer), tokenizer, "tiny")
    assert smollm2_tokenizer(tmp_path / "model.gguf").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_goes_by_llama_cpps_name(cut: str, tmp_path: Path) -> None:
    tokenizer = cut_by(CUTS[cut])
    write_gguf(tmp_path / "model.gguf", tiny("qwen3", tokenizer), tokenizer, "tiny")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == cut


def test_what_llama_cpp_lacks_is_refused_in_one_line(tmp_path: Path) -> None:
    words, path = short_tokenizer(300), tmp_path / "model.gguf"
    huge = tiny("llama", words)
    with torch.no_grad():
        huge.model.layers[1].mlp.up_proj.weight[3, 4] = -70000.0
    refused = {
        r"tiny: has slowed rotations \(rope_type llama3\), which llama\.cpp's qwen3 has not": (
            tiny("qwen3", words, rope_scaling=SLOWED), words, "float16",
        ),
        r"tiny: has a bias in its MLP, which llama\.cpp's olmo2": (
            tiny("olmo2", words, mlp_bias=True), words, "float16",
        ),
        r"tiny: its tokenizer has ids up to 1256, its embedding rows up to 556": (
            tiny("llama", words), short_tokenizer(), "float16",
        ),
        r"tiny: has heads that are together 24 wide in a width of 32, which llama\.cpp's qwen2": (
            tiny("qwen2", words, head_dim=12), words, "float16",
        ),
        r"tiny: llama\.cpp knows no tokenizer that cuts a text like cut; .*smollm": (
            tiny("llama", words), cut_by(split_by(r"\w+|\W")), "float16",
        ),
        r"tiny: blk\.1\.ffn_up\.weight holds 7e\+04, too large for float16; take --dtype bfloat16": (
            huge, words, "float16",
        ),
    }  # fmt: skip
    for line, (model, tokenizer, dtype) in refused.items():
        with pytest.raises(UserError, match=line) as error:
            write_gguf(path, model, tokenizer, "tiny", dtype)
        assert "\n" not in str(error.value)
    write_gguf(path, huge, words, "tiny", "bfloat16")


PROMPTS = ("The city of Rome", "1. One\n2.", "naïve 日本語", "def f(x):")


def greedy(model: StudentLM, prompts: list[list[int]], tokens: int) -> Iterator[list[int]]:
    """transformers' tokens; the padding rows of the embedding are none."""
    network = as_transformers(model, 0)
    none = list(range(model.shape.n_vocab, model.shape.padded_vocab))
    for ids in prompts:
        row = torch.tensor([ids])
        asked = {"max_new_tokens": tokens, "do_sample": False, "suppress_tokens": none, "eos_token_id": ids[0]}
        found = network.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **asked)
        yield found[0, len(ids) :].tolist()


@NEEDED
@pytest.mark.parametrize(("family", "beside"), VARIANTS, ids=NAMES)
def test_llama_cpp_writes_the_tokens_that_transformers_writes(
    family: str, beside: dict[str, object], tmp_path: Path
) -> None:
    words = short_tokenizer()
    model = tiny(family, words, **beside)
    write_gguf(tmp_path / "model.gguf", model, words, "tiny", "float32")
    prompts = [[words.eot_id, *words.encode(text)] for text in PROMPTS]
    _, written = asked(Question(str(tmp_path / "model.gguf"), [], prompts, 24))
    assert written == list(greedy(model, prompts, 24))
    assert len({tuple(row) for row in written}) == len(prompts)


@NEEDED
@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_reads_texts_as_the_same_ids(cut: str, tmp_path: Path) -> None:
    words = cut_by(CUTS[cut])
    write_gguf(tmp_path / "model.gguf", tiny("qwen3", words), words, "tiny")
    texts = [text for text in AWKWARD_TEXTS if text]
    ids, _ = asked(Question(str(tmp_path / "model.gguf"), texts))
    assert dict(zip(texts, ids)) == dict(zip(texts, map(words.encode, texts)))
    ((first, *_),), _ = asked(Question(str(tmp_path / "model.gguf"), ["a"], begun=True))
    assert first == words.eot_id


@NEEDED
@LONG
@pytest.mark.skipif(not (STUDENT / "model.safetensors").is_file(), reason="models/student is not here: make repro")
def test_llama_cpp_writes_what_the_runs_student_writes(tmp_path: Path) -> None:
    model, words = load_student(STUDENT), load_tokenizer(STUDENT)
    write_gguf(tmp_path / "model.gguf", model, words, "student", "float32")
    prompts = [[words.eot_id, *words.encode(text)] for text in (*PROMPTS, *SAMPLED)]
    texts = [text for text in AWKWARD_TEXTS if text]
    ids, written = asked(Question(str(tmp_path / "model.gguf"), texts, prompts, 24))
    assert written == list(greedy(model, prompts, 24)) and ids == list(map(words.encode, texts))
