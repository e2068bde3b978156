"""What a model card says below its metadata. Every figure in it is one of the metrics, rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microlm.errors import plain
from microlm.report.licences import UNKNOWN, Work
from microlm.report.provenance import Origin
from microlm.report.summary import COMPARISONS
from microlm.report.summary_table import MEASURES, amount
from microlm.report.text_table import markdown

DIVERGENCES = {
    "rkl": "reverse KL",
    "fkl": "forward KL",
    "jsd": "a generalized Jensen-Shannon divergence",
    "skew_rkl": "skewed reverse KL",
    "skew_fkl": "skewed forward KL",
    "tvd": "total variation",
    "notebook": "the published notebook's mixture, which is neither KL",
    "minillm": "on-policy reverse KL (MiniLLM)",
}

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """A trained model and what the stages left about it.

    Attributes:
        weights: sha256.
        config: its config.json. training, start, counts: metrics/<name>.json, start.json, tokenize.json.
        source: kind of the corpus; corpus: whose work it is.
        top: the top-level values of params.yaml; distills: whether the student's loss has a teacher in it.
        parameters: all that dvc.yaml lets its stage depend on, by key.
    """

    name: str
    weights: str
    config: Mapping[str, Any]
    training: Mapping[str, Any]
    start: Mapping[str, Any]
    counts: Mapping[str, Any]
    source: str
    corpus: Sequence[Work]
    teacher: Work
    top: Mapping[str, Any]
    distills: bool
    parameters: Mapping[str, Any]

    @property
    def begins(self) -> str:
        """The model whose weights it starts from."""
        return "start" if self.name == "control" or self.top["init"] == "scratch" else "control"


def card_text(arm: Arm, summary: Summary, origin: Origin) -> str:
    """Markdown, from the heading on. KeyError where the summary or the metrics lack an entry."""
    parts = [
        f"# MicroLM {arm.name}",
        _what_it_is(arm, summary),
        "## How it was made",
        _how(arm, summary),
        "## Figures",
        _figures(arm, summary),
        "## Text, teacher and licences",
        _licences(arm),
        "## Limits",
        _limits(arm, summary),
        "## Load it",
        LOADING,
        "## Make it again",
        origin.making(arm.parameters, arm.weights),
    ]
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    """Others' words as a code span in one line, which no mark among them ends."""
    return f"`{' '.join(plain(text).split()).replace('`', chr(39))}`"


def _what_it_is(arm: Arm, summary: Summary) -> str:
    size, shape = amount(summary[arm.name]["parameters"]), arm.config
    role = {
        "control": "the pretrained model, from which the other two arms go on",
        "continued": "the matched control: trained on with cross-entropy alone, over the very tokens of the student",
        "student": f"the distilled model, of the teacher {code(arm.teacher.name)}",
    }[arm.name]
    if arm.name == "student" and not arm.distills:
        role = "the student's arm; without a distillation term (alpha 0) it is the matched control"
    if arm.top["init"] == "scratch" and arm.name == "control":
        role = "a model trained with cross-entropy alone; here the other two arms start where it did, not from it"
    return (
        f"A language model of {size} parameters ({shape['num_hidden_layers']} layers, {shape['hidden_size']} wide, "
        f"{code(shape['architectures'][0])}, context {shape['max_position_embeddings']:,}). It is `{arm.name}`, one of "
        f"three arms of an experiment that asks whether distillation pays for a small model at equal tokens: {role}. "
        "It is not meant for use: it was trained to be compared."
    )


def _how(arm: Arm, summary: Summary) -> str:
    row, training = summary[arm.name], arm.training
    before = f", after {row['tokens_before']:,} of the control" if arm.begins == "control" else ""
    return _bullets(
        [
            f"First weights: {_start(arm)}.",
            f"Training: from `{arm.begins}`, {row['tokens']:,} tokens in {training['steps']:,} steps (epochs over its "
            f"windows: {training['epochs']:g}){before}.",
            f"Loss: {_loss(arm)}.",
            f"Seed: {arm.top['seed']}.",
        ]
    )


def _start(arm: Arm) -> str:
    start, teacher = arm.start, code(arm.teacher.name)
    if start["start"] == "pruned":
        return (
            f"cut out of the teacher {teacher}: its layers {', '.join(map(str, start['layers']))}, "
            f"{100 * start['kept']:.1f} % of its {amount(start['teacher_parameters'])} parameters"
        )
    if start["start"] == "embedding":
        return f"fresh, but for the embedding, which is taken from the teacher {teacher}"
    return "fresh and random"


def _loss(arm: Arm) -> str:
    top = arm.top
    if arm.name != "student" or not arm.distills:
        return "cross-entropy"
    objective = f"{DIVERGENCES[top['objective']]} (`{top['objective']}`)"
    if top["objective"] == "notebook":
        return objective
    weights = f"alpha {top['alpha']:g}"
    if top["alpha_schedule"] != "constant":
        weights += f" to {top['alpha_final']:g} ({top['alpha_schedule']})"
    extra = {"jsd": f", beta {top['beta']:g}"}.get(top["objective"], "")
    if top["objective"].startswith("skew"):
        extra = f", skew {top['skew']:g}"
    tail = "" if top["objective"] == "minillm" else f", the tail of the teacher's record {top['tail']}"
    return (
        f"(1 - alpha) cross-entropy + alpha D(teacher, student), {weights}; D is {objective}{extra}, at temperature "
        f"{top['temperature']:g}{tail}"
    )


def _figures(arm: Arm, summary: Summary) -> str:
    row, teacher = summary[arm.name], summary["teacher"]
    bits = {key: label for key, label in MEASURES.items() if key.endswith("_bpb") and key in row}
    heads = ["bits per byte, fewer are better", arm.name, "teacher"]
    table = [heads, *([label, f"{row[key]:.4f}", f"{teacher[key]:.4f}"] for key, label in bits.items())]
    asked = [benchmark for benchmark in summary["benchmarks"] if arm.name in benchmark]
    outside = f" and {summary['outside_windows']:,} of text of another kind" if "outside_windows" in summary else ""
    tasks = [["benchmark: metric, protocol, exemplars, questions", arm.name, "teacher", "blind"]]
    for one in asked:
        named = f"{one['task']} {one['metric']}, {one['protocol']}, {one['shots']}-shot, {one['items']:,}"
        blind = "" if one["blind"] is None else f"{100 * one['blind']:.1f}"
        tasks.append([named, *(_accuracy(one[name]) for name in (arm.name, "teacher")), blind])
    parts = [
        markdown(table),
        f"Over {summary['windows']:,} windows of held-out text of the corpus{outside}.",
        *([markdown(tasks), _BENCHMARKS] if asked else []),
        *_differences(arm, summary),
    ]
    return "\n\n".join(parts)


_BENCHMARKS = (
    "100 x the metric ± one standard error; blind is what naming the most frequent label scores, or guessing. Figures "
    "of two protocols cannot be compared."
)


def _accuracy(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:.1f} ± {100 * (found['se'] or 0):.1f}"


def _differences(arm: Arm, summary: Summary) -> list[str]:
    """Of the comparisons in which the model has a side: the table, and how to read it."""
    pairs = [pair for pair in COMPARISONS if arm.name in pair]
    rows = [summary[f"{a}_minus_{b}"] for a, b in pairs]
    table = [["paired difference [95 % interval]", *(f"{a} - {b}" for a, b in pairs)]]
    for key, label in MEASURES.items():
        if key in rows[0]:
            cells = (
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(d[key + end] for end in ("", "_low", "_high"))) for d in rows
            )
            table.append([label, *cells])
    said = (
        "Student minus continued is the comparison that speaks of distillation: both saw the same tokens in the same "
        "order. An interval that covers 0 shows no difference; the intervals are of one seed."
    )
    return [markdown(table), said]


def _licences(arm: Arm) -> str:
    trained, held_out = arm.counts["train"], arm.counts["val"]
    lines = [
        f"Text: {trained['documents']:,} documents, {trained['tokens']:,} tokens to train on, of which it saw as "
        f"many as are named above; {held_out['tokens']:,} tokens held out."
    ]
    ours = arm.source == "packaged"
    lines += [f"Text: {work.name if ours else code(work.name)} ({work.said})." for work in arm.corpus]
    involved = arm.start["start"] != "fresh" or (arm.name == "student" and arm.distills)
    part = "its weights or its words are in this model" if involved else "none of it is in this model"
    lines += [f"Teacher: {code(arm.teacher.name)} ({arm.teacher.said}); {part}."]
    if arm.source != "packaged" or not arm.teacher.licence:
        lines += [f"What is {UNKNOWN} has to be found out before this model is passed on."]
    else:
        lines += ["Whether the licence of a text binds a model that was trained on it is not settled: credit the text."]
    return _bullets(lines)


def _limits(arm: Arm, summary: Summary) -> str:
    row = summary[arm.name]
    seen = amount(row["tokens_before"] + row["tokens"] if arm.begins == "control" else row["tokens"])
    kind = "English encyclopaedic text" if arm.source == "packaged" else "the text named above"
    return _bullets(
        [
            f"It saw {seen} tokens of {kind}, far fewer than models in use. What it says may be false or offensive.",
            "It was trained on plain text, without instructions and without a chat template.",
            f"Its accuracies are over few questions; the centred mean of all, 0 for guessing and 1 for all right, is "
            f"{row['centred_mean']:.4f}, 95 % interval {row['centred_mean_low']:.4f} to "
            f"{row['centred_mean_high']:.4f}.",
            "One seed: another order of the text or other first weights would give other figures.",
        ]
    )


LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer(tokenizer.bos_token + "The city of Rome", return_tensors="pt")  # every document began so
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
