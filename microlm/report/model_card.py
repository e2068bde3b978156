"""models/<arm>/README.md: a model card in the hub's format, made from metrics and parameters.

The folder is an output of a training, whose hash DVC would find changed: `.dvcignore` names the cards, and so neither
DVC's cache nor an experiment carries them. A card therefore says which weights and which scores it is of, and `card_of`
is the only way to read one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yaml import YAMLError

from microlm.errors import UserError
from microlm.evaluation.results.store import read_results
from microlm.evaluation.tasks.task import task_named
from microlm.files import SUMS, atomic_file, read_json, read_yaml, sha256_file, sha256_json
from microlm.parameters import ScaleConfig
from microlm.report.card_text import Arm, card_text
from microlm.report.licences import corpus_works, teacher_work
from microlm.report.provenance import Origin
from microlm.report.summary import YARDSTICKS
from microlm.runtime.paths import CARD, METRICS, MODELS, SCORES, SHARDS, TRAINED_MODELS
from microlm.runtime.resume import ROOT

PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
WEIGHTS = "model.safetensors"
AGAIN = "write the cards again: python -m stages.compare --cards"
DERIVED = ("pruned", "embedding")  # starts that hold weights of the teacher


@dataclass(frozen=True)
class Asked:
    """What params.yaml asks for: its top-level values, the chosen scale, and whether the student distills at all."""

    top: Mapping[str, Any]  # with `scale`, and `start` as it was resolved
    at: ScaleConfig
    distills: bool


def weights_sha256(folder: Path) -> str:
    """Of the folder's weights, as its SHA256SUMS has it, or of the file. UserError where neither is there."""
    if (folder / SUMS).is_file():
        listed = dict(
            reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text().splitlines() if "  " in line
        )
        if WEIGHTS in listed:
            return listed[WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        stage = TRAINED_MODELS.get(folder.name, folder.name)
        raise UserError(f"{folder / WEIGHTS} is not there; make it with: dvc repro {stage}")
    return sha256_file(folder / WEIGHTS)


def card_of(folder: Path) -> str | None:
    """The folder's model card; None where it has none.

    Raises:
        UserError: it is of other weights than those beside it, or says of none.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    if _weights_named(path) != weights_sha256(folder):
        raise _other_weights(folder)
    return path.read_text(encoding="utf-8")


def refuse_other_weights(folder: Path) -> None:
    """UserError where the card names other weights than those beside it, and must not travel with them. One that a
    person wrote names none.
    """
    path = folder / CARD
    if path.is_file() and _weights_named(path) not in (None, weights_sha256(folder)):
        raise _other_weights(folder)


def _weights_named(card: Path) -> str | None:
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(card) or {}).get("weights_sha256")
    except (ValueError, YAMLError) as error:
        raise UserError(f"{card}: not readable as a model card ({' '.join(str(error).split())}); {AGAIN}") from None


def _other_weights(folder: Path) -> UserError:
    return UserError(f"{folder / CARD}: is of other weights than {folder / WEIGHTS}; remove it, or {AGAIN}")


def stale_cards(summary: Mapping[str, Any]) -> list[str]:
    """What is wrong with the cards: one of other weights or other scores, or none beside weights."""
    from huggingface_hub import metadata_load

    found = []
    for folder in (MODELS / name for name in TRAINED_MODELS if (MODELS / name / WEIGHTS).is_file()):
        try:
            if card_of(folder) is None:
                found.append(f"{folder} has no model card; {AGAIN}")
            elif metadata_load(folder / CARD).get("summary_sha256") != sha256_json(summary):
                found.append(f"{folder / CARD}: has other figures than metrics/summary.json; {AGAIN}")
        except UserError as error:
            found.append(str(error))
    return found


def write_cards(summary: Mapping[str, Any], asked: Asked, origin: Origin) -> list[Path]:
    """models/<arm>/README.md of every trained model; all of them are made before the first is written.

    Raises:
        UserError: a model is not there, or its weights are not those that were scored.
    """
    cards = {MODELS / name / CARD: model_card(name, summary, asked, origin) for name in TRAINED_MODELS}
    for path, card in cards.items():
        with atomic_file(path, "w") as file:
            file.write(card)
    return list(cards)


def refuse_unrun(scale: str) -> None:
    """UserError where params.yaml asks for another training than dvc.lock says was run: a card would tell of both."""
    if not LOCK.is_file():
        return
    locked = read_yaml(LOCK, "", "").get("stages") or {}
    params = read_yaml(PARAMS, "run from the top folder of the repository", "scale: laptop")
    for name, stage in TRAINED_MODELS.items():
        ran = (locked.get(stage) or {}).get("params", {}).get(str(PARAMS), {})
        for key in (key.replace("${scale}", scale) for key in _stages()[stage]["params"]):
            value: Any = params
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if key not in ran or ran[key] != value:
                raise UserError(
                    f"{PARAMS}: {key} is not what {MODELS / name} was trained with; run dvc repro, which writes the "
                    f"cards too, or take {PARAMS} and the models from one commit or experiment"
                )


def model_card(name: str, summary: Mapping[str, Any], asked: Asked, origin: Origin) -> str:
    """The card of the arm `name`. UserError as `write_cards`."""
    from huggingface_hub import ModelCardData

    arm = _arm(name, summary, asked)
    teacher, hub_text = arm.teacher, [work.hub for work in arm.corpus if work.hub]
    derived, learned = arm.start["start"] in DERIVED, name == "student" and asked.distills
    licence = _licence(arm, derived or learned)
    data = ModelCardData(
        model_name=f"microlm-{name}",
        language="en" if arm.source == "packaged" else None,
        license=licence or "other",
        license_name=None if licence else "not-known-here",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "microlm",
            *(["pruned"] if arm.start["start"] == "pruned" else []),
            *(["distillation"] if learned else []),
        ],
        base_model=(teacher.hub or None) if derived else None,
        datasets=hub_text or None,
        eval_results=_results(arm, summary),
        weights_sha256=arm.weights,
        summary_sha256=sha256_json(summary),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{card_text(arm, summary, origin)}"


def _licence(arm: Arm, of_teacher: bool) -> str:
    """As the hub spells it: the teacher's where the weights are made from it, and "" where something is not known."""
    if arm.source != "packaged":
        return ""
    return arm.teacher.licence if of_teacher else "apache-2.0"


def _arm(name: str, summary: Mapping[str, Any], asked: Asked) -> Arm:
    """What the card of `name` tells, gathered from where the stages left it."""
    stage, folder = TRAINED_MODELS[name], MODELS / name
    weights = weights_sha256(folder)
    scored = {result.identity.model_digest for result in read_results(SCORES / name)}
    if scored != {weights}:
        raise UserError(
            f"{folder}: its weights are not those that {SCORES / name} scored; make both fit with: "
            f"dvc repro evaluate@{name}"
        )
    source = read_json(SHARDS / "manifest.json", "tokenize")["source"]
    return Arm(
        name,
        weights,
        config=read_json(folder / "config.json", stage),
        training=read_json(METRICS / f"{name}.json", stage),
        start=read_json(METRICS / "start.json", "start"),
        counts=read_json(METRICS / "tokenize.json", "tokenize"),
        source=source["source"],
        corpus=corpus_works(source),
        teacher=teacher_work(asked.at.teacher.model),
        top=asked.top,
        distills=asked.distills,
        parameters=stage_parameters(stage, asked),
    )


def stage_parameters(stage: str, asked: Asked) -> dict[str, Any]:
    """What dvc.yaml says that the stage depends on, as params.yaml has it; `start.fresh` is in the blocks already."""
    block, found = asdict(asked.at), {}
    for key in _stages()[stage]["params"]:
        *above, last = key.split(".")
        if above[:1] != ["scales"]:
            found[key] = asked.top[key]
        elif last != "fresh":
            value = block
            for part in [*above, last][2:]:
                value = value[part]
            found[key.replace("${scale}", asked.top["scale"])] = value
    return found


@cache
def _stages() -> dict[str, Any]:
    return read_yaml(ROOT / "dvc.yaml", "take it from Git again: git checkout dvc.yaml", "stages:")["stages"]


def _results(arm: Arm, summary: Mapping[str, Any]) -> list[Any]:
    """The hub's `model-index`: each figure with its protocol in its name."""
    from huggingface_hub import EvalResult

    row, found = summary[arm.name], []
    for key, words in (("val_bpb", "held-out text of the corpus"), ("ood_bpb", "text of another kind")):
        if key in row:
            windows = summary["windows" if key == "val_bpb" else "outside_windows"]
            named = f"bits per byte, {windows:,} windows"
            where = YARDSTICKS[key][0]
            found.append(EvalResult("text-generation", where, words, "bits_per_byte", row[key], metric_name=named))
    for row in summary["benchmarks"]:
        if arm.name not in row:
            continue
        task, (value, se) = task_named(row["task"]), (row[arm.name][key] for key in ("value", "se"))
        how = f"{row['metric']}, {row['protocol']} protocol, {row['shots']}-shot, {row['items']:,} questions"
        named = how if se is None else f"{how}, standard error {se:.4f}"
        dataset = task.source.dataset or task.name
        found.append(
            EvalResult(
                *("text-generation", dataset, task.name, row["metric"], value),
                dataset_split=task.split,
                metric_name=named,
            )
        )
    return found
