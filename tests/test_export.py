"""Promises of `microlm export`: a folder that others load, a GGUF of the same weights, and nothing else touched."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from microlm.files import SUMS, check_sums
from microlm.models.gguf_models import GgufFile
from tests.support.other_tokenizers import write_teacher
from tests.support.soak import LONG
from tests.support.tiny_candidates import microlm, repository
from tests.support.workspace import short_tokenizer
from tests.test_cli import told

STUDENT = Path("models/student")
CARD = "---\nlicense: mit\n---\n# A student\n"


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def exported(*arguments: object) -> str:
    said = microlm("export", *arguments)
    assert said.code == 0, said.err
    return said.out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_has_what_others_need_and_no_more(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(STUDENT, source)
    (source / SUMS).unlink()
    (source / "README.md").write_text(CARD)
    (source / "optimizer.safetensors").write_bytes(b"moments")
    (source / ".cache").mkdir()
    assert exported(source, "--out", out).startswith(f"{out}: ")
    there = contents(out)
    assert set(there) == {*(path.name for path in STUDENT.iterdir()), "README.md"}
    assert all(there[name] == (source / name).read_bytes() for name in there if name != SUMS)
    check_sums(out, there, "never")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        one, other = (AutoModelForCausalLM.from_pretrained(where)(tokens).logits for where in (source, out))
    assert torch.equal(one, other) and AutoTokenizer.from_pretrained(out)("Rome")["input_ids"]
    exported(source, "--out", out)  # again: the same, so nothing is in its way
    assert contents(out) == there


def test_a_card_of_other_weights_does_not_travel_with_these(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(STUDENT, source)
    (source / "README.md").write_text(f"---\nweights_sha256: {'0' * 64}\n---\n# A student\n")
    assert "README.md: is of other weights than" in told(microlm("export", source, "--out", out)) and not out.exists()


def test_what_is_there_and_is_something_else_stays(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "model.gguf"
    exported(STUDENT, "--out", out, "--gguf", file)
    before = contents(out), file.read_bytes()
    exported(STUDENT, "--out", out, "--gguf", file)
    refused = r"is there already, and is something else; name another place, or move it away"
    for asked in (("--out", out), ("--gguf", file)):
        assert re.search(f"^{re.escape(str(asked[1]))}: {refused}$", told(microlm("export", "models/second", *asked)))
    assert (contents(out), file.read_bytes()) == before
    (out / "README.md").write_text("mine")
    (out / ".git").mkdir()
    for model in (STUDENT, "models/second"):
        assert re.search(f"^{re.escape(str(out))}: {refused}$", told(microlm("export", model, "--out", out)))
    assert (out / "README.md").read_text() == "mine" and (out / ".git").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model.gguf"}


def test_a_gguf_is_named_after_model_and_type_and_holds_both(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(STUDENT, source)
    (source / "README.md").write_text(CARD)
    said = exported(source, "--gguf", "--dtype", "bfloat16")
    assert re.fullmatch(r"mine-BF16\.gguf: \d MB, [\d,]+ parameters, bfloat16\n", said)
    file = Path("mine-BF16.gguf")
    read = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert (fields["general.name"], fields["general.license"]) == ("mine", "mit")
    assert fields["general.architecture"] == "qwen3"
    assert fields["tokenizer.ggml.bos_token_id"] == short_tokenizer(6000).eot_id
    assert fields["tokenizer.ggml.add_bos_token"]
    weights = load_file(STUDENT / "model.safetensors")
    (up,) = (t for t in read.tensors if t.name == "blk.1.ffn_up.weight")
    wanted = weights["model.layers.1.mlp.up_proj.weight"].bfloat16().float()
    assert torch.equal(torch.from_numpy(gguf.dequantize(up.data, up.tensor_type).copy()), wanted)
    exported(source, "--out", tmp_path / "out", "--gguf", "--dtype", "bfloat16")
    assert (tmp_path / "out" / "mine-BF16.gguf").read_bytes() == file.read_bytes()
    check_sums(tmp_path / "out", contents(tmp_path / "out"), "never")


def test_a_model_of_others_is_written_too(tmp_path: Path) -> None:
    exported("models/llama", "--gguf", tmp_path / "llama.gguf", "--dtype", "float32")
    read, tokens = GgufFile(tmp_path / "llama.gguf").network(torch.float32), torch.arange(20)[None]
    network = AutoModelForCausalLM.from_pretrained("models/llama")
    with torch.inference_mode():
        theirs = network(tokens).logits[..., : read.config.vocab_size]
        torch.testing.assert_close(read(tokens).logits, theirs, rtol=0, atol=1e-5)
    fields = gguf.GGUFReader(tmp_path / "llama.gguf").fields
    assert not fields["tokenizer.ggml.add_bos_token"].contents()  # as transformers encodes a prompt for it
    assert read.config.eos_token_id == network.generation_config.eos_token_id
    assert read.config.vocab_size == short_tokenizer(6000).n_vocab < network.config.vocab_size


MISTAKES = [
    ([STUDENT], r"microlm export: name what to write: --out FOLDER, --gguf, or both"),
    ([STUDENT, "--out", "."], r"\.: is there already, and is something else"),
    ([STUDENT, "--out", "params.yaml"], r"--out: params\.yaml is no folder"),
    ([STUDENT, "--gguf", "models"], r"--gguf: models is a folder; name a file in it"),
    ([STUDENT, "--gguf", "x", "--dtype", "int4"], r"--dtype: invalid choice: 'int4'"),
    (["./models/nothing", "--gguf", "x"], r"\./models/nothing: is no model directory"),
    (["gpt2ish", "--gguf", "x"], r"gpt2ish: is of architecture 'gpt2', .* llama, mistral, .*; export another model"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[line for _, line in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(arguments: list[object], line: str) -> None:
    if arguments[0] == "gpt2ish":
        write_teacher(Path("gpt2ish"), "gpt2", short_tokenizer(), 5)
    before = set(Path().iterdir())
    assert re.search(line, told(microlm("export", *arguments)))
    assert set(Path().iterdir()) == before


def test_a_weight_too_large_for_the_type_leaves_no_file(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    shutil.copytree("models/llama", huge)
    network = AutoModelForCausalLM.from_pretrained(huge)
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    network.save_pretrained(huge)
    for place in (["--gguf", tmp_path / "huge.gguf"], ["--out", tmp_path / "out", "--gguf"]):
        line = told(microlm("export", huge, *place))
        assert "blk.0.ffn_up.weight holds 1e+05, too large for float16; take --dtype bfloat16" in line
    assert {path.name for path in tmp_path.iterdir()} == {"huge"}


@LONG
def test_the_packaged_teacher_is_written_with_the_logits_that_it_has(tmp_path: Path) -> None:
    exported("packaged", "--gguf", tmp_path / "t.gguf", "--dtype", "float32", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        read = GgufFile(tmp_path / "t.gguf").network(torch.float32)(tokens).logits
        folder = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert torch.equal(read, folder)
