"""Promises of the models to be scored: ours and others' give the same figures; what cannot be scored is refused."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from microlm.errors import UserError
from microlm.evaluation.candidates import Candidate, load_candidate
from microlm.evaluation.run import score_benchmark
from microlm.evaluation.tasks.benchmarks import benchmarks, gather
from microlm.files import SUMS
from microlm.models import model_files
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel
from microlm.runtime.paths import CARD
from tests.support.tiny_candidates import as_others_export, repository, save_tiny_student

BATCH_TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def loaded(name: object) -> Candidate:
    return load_candidate(str(name), None, torch.float32)


def test_a_student_whose_matrices_are_cast_once_gives_the_bits_of_one_that_casts_in_every_pass() -> None:
    path = Path("models/student")
    once, always = load_candidate(str(path), None, torch.bfloat16).model, model_files.load_student(path, torch.bfloat16)
    tokens = torch.arange(40).view(2, 20)
    assert once.head_weight.dtype == torch.bfloat16 and always.head_weight.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(once.hidden(tokens), always.eval().hidden(tokens))
        assert torch.equal(once.logits(once.hidden(tokens)), always.logits(always.hidden(tokens)))


@pytest.mark.parametrize(
    ("task", "protocol", "shots"),
    [("hellaswag", "completion", 0), ("hellaswag", "lm-eval", 0), ("rte", "lm-eval", 2), ("cb", "infill", 0)],
)
def test_a_model_scores_the_same_as_ours_and_as_transformers_reads_it(
    task: str, protocol: str, shots: int, tmp_path: Path
) -> None:
    ours, theirs = loaded("models/student"), loaded(as_others_export(Path("models/student"), tmp_path / "exported"))
    assert isinstance(ours.model, StudentLM) and isinstance(theirs.model, TransformersModel)
    assert ours.start_token == theirs.start_token and ours.model.n_vocab == theirs.model.n_vocab
    (material,) = gather(benchmarks([task], protocol, [shots], 24), None, hub=False)
    a, b = (score_benchmark(model, material, BATCH_TOKENS) for model in (ours, theirs))
    nats = [column for column in a.table if re.fullmatch(r"(nats|unconditional)_\d", column)]
    assert len(nats) > 1 and np.ptp(a.table[nats].to_numpy()) > 1
    np.testing.assert_allclose(a.table[nats], b.table[nats], rtol=0, atol=1e-4)
    sure = ~a.table["near_tie"].to_numpy(bool)
    assert sure.any() and list(a.table["prediction_sum"][sure]) == list(b.table["prediction_sum"][sure])


def test_a_model_is_told_by_its_weights_and_tokenizer_not_by_its_place(tmp_path: Path) -> None:
    student, second = loaded("models/student"), loaded("models/second")
    shutil.copytree("models/student", tmp_path / "moved")
    moved = loaded(tmp_path / "moved")
    assert (moved.weights, moved.tokenizer.fingerprint) == (student.weights, student.tokenizer.fingerprint)
    assert second.weights != student.weights and second.tokenizer.fingerprint == student.tokenizer.fingerprint
    definition = (tmp_path / "moved" / "tokenizer.json").read_text()
    assert '"content":"<|endoftext|>"' in definition
    llama, relabelled = loaded("models/llama"), tmp_path / "relabelled"
    shutil.copytree("models/llama", relabelled)
    merges = re.sub(r'("merges":\[)(\[[^\]]*\]|"[^"]*"),', r"\1", definition)  # one merge fewer
    assert merges != definition
    (relabelled / "tokenizer.json").write_text(merges)
    assert (
        loaded(relabelled).weights == llama.weights
        and loaded(relabelled).tokenizer.fingerprint != llama.tokenizer.fingerprint
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        r"config\.json is not there; name a folder with config\.json",
    ),
    "damaged config": (lambda d: (d / "config.json").write_text("{"), r"config\.json is damaged .*make it again"),
    "config of a list": (lambda d: (d / "config.json").write_text("[1]"), r"config\.json is damaged .*make it again"),
    "no weights": (
        lambda d: (d / model_files.WEIGHTS).unlink(),
        r"(?=.*model\.safetensors).*(make it again|name a folder)",
    ),
    "cut weights": (
        lambda d: cut(d / model_files.WEIGHTS),
        r"(header|model\.safetensors: damaged).*(make it again|name a folder)",
    ),
    "noise for weights": (
        lambda d: (d / model_files.WEIGHTS).write_bytes(b"\xff" * 5000),
        r"(header|model\.safetensors: damaged).*(make it again|name a folder)",
    ),
    "no tokenizer": (
        lambda d: [file.unlink() for file in (*d.glob("*token*.json"),)],
        r"(?=.*tokenizer).*(make it again|name a folder)",
    ),
    "no tokenizer.json": (
        lambda d: (d / "tokenizer.json").unlink(),
        r"tokenizer.*(the model again|name a folder)",
    ),
    "damaged tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), r"make the model again|name a folder"),
}


@pytest.mark.parametrize("kind", ["student", "llama"])
@pytest.mark.parametrize("damage", SPOILED)
def test_a_directory_that_lacks_a_file_or_holds_a_damaged_one_is_named_with_the_mend(
    kind: str, damage: str, tmp_path: Path
) -> None:
    copy = tmp_path / "spoiled"
    shutil.copytree(Path("models") / kind, copy)
    spoil, told = SPOILED[damage]
    spoil(copy)
    with pytest.raises(UserError, match=told) as error:
        loaded(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_shape_than_the_configuration_are_refused(tmp_path: Path) -> None:
    save_tiny_student(tmp_path / "shorter")
    (tmp_path / "shorter" / SUMS).unlink()
    config = tmp_path / "shorter" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or not of config\.json's shape") as error:
        loaded(tmp_path / "shorter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./models/nothing", "/nowhere/student", "models/a/b", "params.yaml"])
def test_a_path_without_a_model_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: is no model directory; name a folder") as error:
        loaded(name)
    assert "\n" not in str(error.value)


def test_a_card_beside_the_weights_is_no_damage(tmp_path: Path) -> None:
    """Its sums are of the stage that wrote the weights, and the card is of a later one."""
    save_tiny_student(tmp_path / "model")
    assert (tmp_path / "model" / SUMS).is_file()
    (tmp_path / "model" / CARD).write_text("---\nlicense: mit\n---\n")
    loaded(tmp_path / "model")
    model_files.from_transformers(str(tmp_path / "model"), None, torch.float32)  # as a teacher is read
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        model_files.from_transformers(str(tmp_path / "model"), None, torch.float32)


def drop_a_tensor(directory: Path) -> None:
    weights = load_file(directory / model_files.WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / model_files.WEIGHTS, metadata={"format": "pt"})


def configure(directory: Path, **changed: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (drop_a_tensor, r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight \(1 tensors.*make the model again"),
        (lambda d: configure(d, num_hidden_layers=3), r"its weights lack model\.layers\.2.*make the model again"),
        (lambda d: configure(d, hidden_size=64), r"could not be read .*name a folder"),
        (lambda d: configure(d, num_hidden_layers="two"), r"could not be read .*name a folder"),
        (lambda d: configure(d, model_type="nonesuch"), r"could not be read .*name a folder"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"could not be read .*name a folder"),
    ],
)
def test_another_s_model_is_never_filled_up_with_random_numbers(
    spoil: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    copy = tmp_path / "spoiled"
    shutil.copytree("models/llama", copy)
    spoil(copy)
    with pytest.raises(UserError, match=told) as error:
        loaded(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)
