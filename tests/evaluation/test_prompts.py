"""Promises of the prompts: every scored string is the one its protocol publishes."""

import gzip
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.corpus.parts import EVALUATION, OLMES_REQUESTS
from microlm.errors import UserError
from microlm.evaluation.tasks.benchmarks import _own, few_shot
from microlm.evaluation.tasks.data import Rows, read_rows
from microlm.evaluation.tasks.prompts import Question, questions, true_ending
from microlm.evaluation.tasks.task import TASKS, Task
from tests.evaluation.test_task_files import read_published
from tests.support.clones import FIXTURES

HELLASWAG = TASKS["hellaswag"]
REQUESTS = json.loads((FIXTURES / "lm_eval_requests.json").read_text())
every_wording = pytest.mark.parametrize(
    ("task", "protocol"), [(task, protocol) for task in TASKS.values() for protocol in task.protocols]
)


@pytest.fixture(scope="module")
def hellaswag(parts: Path) -> Rows:
    return read_rows(HELLASWAG, None, hub=False, parts=parts)


@pytest.fixture(scope="module")
def requests(parts: Path) -> list[dict]:
    """AI2's five-shot requests over the whole validation split; the unconditional ones come after a million."""
    with gzip.open(parts / EVALUATION / OLMES_REQUESTS["hellaswag"], "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def asked(name: str, protocol: str) -> list[Question]:
    """The fixtures' questions."""
    return questions(TASKS[name], protocol, read_published(TASKS[name]))


EGG = "Question 1: How do I boil an egg?\nQuestion 2: What is the way to boil an egg?\nQuestion: "
FERRY = (
    "Sentence 1: The ferry was late on Friday, officials said.\nSentence 2: Officials said Friday's ferry was late.\n"
)
ROWING = "Sentence 1: A man rows a boat.\nSentence 2: A man is rowing a boat.\nQuestion: "
WORDED = [
    ("cola", "lm-eval", 0, "The kettle boiled over.\nQuestion: Does this sentence make sense?\nAnswer:", " no| yes"),
    (
        *("sst2", "lm-eval", 0),
        "a film of rare charm and wit . \nQuestion: Is this sentence positive or negative?\nAnswer:",
        " negative| positive",
    ),
    ("mrpc", "lm-eval", 0, FERRY + "Question: Do both sentences mean the same thing?\nAnswer:", " no| yes"),
    ("qqp", "lm-eval", 0, EGG + "Do both questions ask the same thing?\nAnswer:", " no| yes"),
    (
        *("mnli", "lm-eval", 0),
        "The lamp went out at nine.\nQuestion: It was dark after nine. True, False or Neither?\nAnswer:",
        " True| Neither| False",
    ),
    (
        *("mnli", "lm-eval", 2),
        "No votes were counted.\nQuestion: Every vote was counted. True, False or Neither?\nAnswer:",
        " True| Neither| False",
    ),
    (
        *("mnli_mismatched", "lm-eval", 1),
        "The word is older than the coin.\nQuestion: The word is newer than the coin. True, False or Neither?\nAnswer:",
        " True| Neither| False",
    ),
    (
        *("qnli", "lm-eval", 0),
        "Who built the mill?\nThe mill was built by two brothers.\n"
        "Question: Does this response answer the question?\nAnswer:",
        " yes| no",
    ),
    (
        *("rte", "lm-eval", 2),
        "Two lakes froze over.\nQuestion: A river froze over. True or False?\nAnswer:",
        " True| False",
    ),
    (
        *("wnli", "lm-eval", 2),
        "Eva lent Mia a book and she read it twice.\nQuestion: Mia read it twice. True or False?\nAnswer:",
        " False| True",
    ),
    (
        *("cb", "lm-eval", 2),
        "Perhaps the shop has a cellar.\nQuestion: the shop has a cellar. True, False, or Neither?\nAnswer:",
        " True| False| Neither",
    ),
    (
        *("cb", "infill", 2),
        "Perhaps the shop has a cellar., right?",
        " Yes, the shop has a cellar| No, the shop has a cellar| Also, the shop has a cellar",
    ),
    (
        *("snli", "question", 2),
        "A dog leaps over a log.\nQuestion: A dog is asleep. True, False or Neither?\nAnswer:",
        " True| Neither| False",
    ),
    (
        *("snli", "infill", 2),
        "A dog leaps over a log., right?",
        " Yes, A dog is asleep| Also, A dog is asleep| No, A dog is asleep",
    ),
    (
        *("mnli", "infill", 2),
        "No votes were counted., right?",
        " Yes, Every vote was counted. | Also, Every vote was counted. | No, Every vote was counted. ",
    ),
    (
        *("stsb", "microlm", 0),
        ROWING + "From 0 (unrelated) to 5 (the same), how close in meaning are the sentences?\nAnswer:",
        " 0| 1| 2| 3| 4| 5",
    ),
]


BEES, MILL = (
    "Bees gather nectar.\nThey turn it into honey.",
    "Mill -- The mill by the ford was shut in 1950 and has been",
)
LETTERED = "Question: Where is bread baked?\nA. oven\nB. river\nC. cloud\nD. shoe\nE. book\nAnswer:"
BOAT = '"Take the boat," said Anna. He took the'
SHELF = "The box did not fit the shelf because the "
WORDED += [
    *(
        (name, how, 0, f"Question: {question}\nAnswer:", endings)
        for how in ("lm-eval", "olmes")
        for name, question, endings in (
            ("arc_easy", "Which of these is a liquid at room temperature?", " iron| water| glass| salt"),
            (
                "arc_challenge",
                "A kettle whistles because",
                " steam leaves it| its lid is hot| water freezes| the room is cold",
            ),
        )
    ),
    ("arc_easy", "olmes", 2, "Question: Which animal lays eggs?\nAnswer:", " the hen| the cow| the goat"),
    ("piqa", "lm-eval", 0, "Question: To dry a wet shoe,\nAnswer:", " fill it with newspaper | fill it with water"),
    ("piqa", "olmes", 1, "Goal: To dry a wet shoe,\nAnswer:", " leave it in the rain| leave it in the sun"),
    ("sciq", "lm-eval", 0, f"{BEES}\nQuestion: What do bees make?\nAnswer:", " milk| silk| wool| honey"),
    ("sciq", "lm-eval", 1, "\nQuestion: What do sheep give?\nAnswer:", " silk| honey| ink| wool"),
    ("sciq", "olmes", 0, "Question: What do bees make?\nAnswer:", " milk| silk| wool| honey"),
    ("openbookqa", "lm-eval", 0, "A lamp needs", " sand| a current| a song| a door"),
    ("openbookqa", "olmes", 0, "Question: A lamp needs\nAnswer:", " sand| a current| a song| a door"),
    ("winogrande", "lm-eval", 0, SHELF, " was too wide.| was too wide."),
    ("winogrande", "olmes", 2, "Ben thanked Carl, for ", " 's lamp had been mended.| 's lamp had been mended."),
    (
        *("social_iqa", "lm-eval", 2, "Q: Leo broke a cup. What will Leo do next?\nA:"),
        " sing| read| sweep the floor",
    ),
    (
        *("social_iqa", "olmes", 2, "Question: Leo broke a cup. What will Leo do next?\nAnswer:"),
        " sing| read| sweep the floor",
    ),
    ("commonsense_qa", "lm-eval", 0, LETTERED, " A| B| C| D| E"),
    ("commonsense_qa", "olmes", 1, "Question: What is read at night?\nAnswer:", " oven| river| cloud| shoe| book"),
    ("copa", "lm-eval", 0, "The kettle boiled over therefore", "  the stove got wet.|  it began to snow."),
    ("copa", "lm-eval", 1, "The bridge was closed because", "  a bird sang.|  the river had risen."),
    *(
        ("boolq", how, 0, f"{MILL} a museum since.\nQuestion: is the mill still in use?\nAnswer:", " no| yes")
        for how in ("lm-eval", "olmes")
    ),
    ("lambada_openai", "lm-eval", 0, BOAT, " boat"),
]


@pytest.mark.parametrize(("name", "protocol", "row", "context", "endings"), WORDED)
def test_wordings_are_byte_exact(name: str, protocol: str, row: int, context: str, endings: str) -> None:
    question = asked(name, protocol)[row]
    assert question.context == context
    assert "|".join(question.endings) == endings


def test_every_wording_but_hellaswags_is_spelled_out_above() -> None:
    every = {(task.name, protocol) for task in TASKS.values() for protocol in task.protocols}
    spelled = {(name, protocol) for name, protocol, *_ in WORDED}
    assert every - spelled == {(HELLASWAG.name, protocol) for protocol in HELLASWAG.protocols} | {
        ("mnli_mismatched", "infill")
    }


@every_wording
def test_labels_lengths_and_clusters_fit_the_rows(task: Task, protocol: str) -> None:
    rows = read_published(task).rows
    asked = questions(task, protocol, Rows(rows, {}))
    assert [(question.task, question.id, question.label) for question in asked] == [
        (task.name, row["id"], row["label"]) for row in rows
    ]
    for question in asked:
        assert all(ending.startswith(" ") for ending in question.endings)
        space = 0 if protocol == "olmes" else 1
        assert question.characters == tuple(len(ending) - space for ending in question.endings)
        assert question.unconditional
        assert true_ending(question).endswith(question.endings) and len(question.read()) == max(
            1, len(question.openings)
        )
    shared = Counter((row.get(task.cluster, "") if task.cluster else "") or row["id"] for row in rows)
    if task.name == "winogrande":
        shared = Counter(row["endings"][1] for row in rows)  # twins, and the third
    assert sorted(Counter(question.cluster for question in asked).values()) == sorted(shared.values())


def test_braces_and_line_breaks_in_a_text_are_text() -> None:
    rows = Rows([{"id": "0", "sentence": "a {label} {0}\n{{b}} %s", "label": 1}], {})
    assert questions(TASKS["cola"], "lm-eval", rows)[0].context.startswith("a {label} {0}\n{{b}} %s\nQuestion:")


def lm_evals_text(text: str) -> str:
    """lm-evaluation-harness's rules, one after the other."""
    text = text.strip().replace(" [title]", ". ")
    while "[" in text and "]" in text[text.index("[") :]:
        start = text.index("[")
        end = text.index("]", start)
        text = text[:start] + text[end + 1 :]
    return text.replace("  ", " ")


@given(st.lists(st.sampled_from(["word", " ", "  ", ".", " [title]", "[step]", " [header] ", "é", ". "])).map("".join))
def test_lm_evals_rendering_follows_its_rules_to_the_byte(text: str) -> None:
    row = {"id": "0", "activity_label": "Act", "ctx_a": text, "ctx_b": "eNDS", "ctx": text, "label": 0}
    rows = Rows([row | {"endings": [text, "b", "c", "d"], "source_id": "wikihow~1", "split_type": "zeroshot"}], {})
    (question,) = questions(HELLASWAG, "lm-eval", rows)
    assert question.context == lm_evals_text(f"Act: {text} Ends")
    assert question.endings == (" " + lm_evals_text(text), " b", " c", " d")


def test_completion_is_the_raw_text_with_one_space(hellaswag: Rows) -> None:
    for question, row in zip(questions(HELLASWAG, "completion", hellaswag), hellaswag.rows):
        assert question.context == row["ctx"] and list(question.endings) == [f" {ending}" for ending in row["endings"]]
        assert question.cluster == row["source_id"]


def test_lm_evals_double_spaces_stay(hellaswag: Rows) -> None:
    endings = [ending for question in questions(HELLASWAG, "lm-eval", hellaswag) for ending in question.endings]
    assert len(endings) == 40_168 and sum(ending.startswith("  ") for ending in endings) == 10_862


def test_olmes_is_what_ai2_publishes_for_every_question(hellaswag: Rows, requests: list[dict], parts: Path) -> None:
    asked, prefix = questions(HELLASWAG, "olmes", hellaswag), few_shot(HELLASWAG, "olmes", 5, parts)
    assert len(requests) == 80_336
    for request in requests:
        question, sent = asked[request["doc_id"] % 1_000_000], request["request"]
        conditional = request["doc_id"] < 1_000_000
        assert sent["context"] == (prefix + question.context if conditional else question.unconditional)
        assert sent["continuation"] == question.endings[request["idx"]]
        assert request["label"] == question.label


def test_olmes_differs_from_lm_eval_only_in_the_full_stop_of_a_title(hellaswag: Rows) -> None:
    pairs = zip(questions(HELLASWAG, "olmes", hellaswag), questions(HELLASWAG, "lm-eval", hellaswag))
    differing: Counter[str] = Counter()
    for row, (olmes, lm_eval) in zip(hellaswag.rows, pairs):
        stopped = [". [title]" in text.strip() for text in (f"{row['ctx_a']} {row['ctx_b']}", *row["endings"])]
        unlike = [a != b for a, b in zip((olmes.context, *olmes.endings), (lm_eval.context, *lm_eval.endings))]
        assert unlike == stopped
        differing.update(contexts=unlike[0], endings=sum(unlike[1:]), questions=any(unlike))
    assert differing == {"contexts": 777, "endings": 4_146, "questions": 3_073}


@pytest.mark.parametrize("name", [name for name in OLMES_REQUESTS if name != "hellaswag"])
def test_every_request_of_ai2_is_met(name: str, parts: Path) -> None:
    """Contexts, exemplars included, continuations and labels; BoolQ's answers come in the other order there."""
    task, met = TASKS[name], 0
    asked = questions(task, "olmes", read_rows(task, None, hub=False, parts=parts))
    prefix = few_shot(task, "olmes", 5, parts)
    with gzip.open(parts / EVALUATION / OLMES_REQUESTS[name], "rt", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            question, k, label = asked[request["doc_id"] % 1_000_000], request["idx"], request["label"]
            if name == "boolq":
                k, label = 1 - k, 1 - label
            context = prefix + question.read()[k if question.openings else 0].context
            sent = request["request"]
            assert sent["context"] == (context if request["doc_id"] < 1_000_000 else question.unconditional)
            assert sent["continuation"] == question.endings[k] and label == question.label
            met += 1
    assert met == AI2S[name]


AI2S = {
    "arc_easy": 4_562,
    "arc_challenge": 2_388,
    "piqa": 7_352,
    "sciq": 8_000,
    "openbookqa": 4_000,
    "winogrande": 2_534,
    "social_iqa": 11_724,
    "commonsense_qa": 12_210,
    "boolq": 6_540,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_is_the_one_that_lm_eval_builds(name: str, parts: Path) -> None:
    """The digests are of the harness's own requests for the whole split: `python -m bench.lm_eval_tasks --requests`."""
    task = TASKS[name]
    asked = questions(task, "lm-eval", read_rows(task, None, hub=False, parts=parts))
    pairs = ([read.context, ending] for question in asked for read in question.read() for ending in read.endings)
    lines = (json.dumps(pair) + "\n" for pair in pairs)
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == REQUESTS[name]


def test_hellaswags_exemplars_are_those_before_every_question(requests: list[dict], parts: Path) -> None:
    five = few_shot(HELLASWAG, "completion", 5, parts)
    contexts = (request["request"]["context"] for request in requests if request["doc_id"] < 1_000_000)
    assert {context.rpartition("\n\n")[0] for context in contexts} == {five.removesuffix("\n\n")}
    assert five.startswith(few_shot(HELLASWAG, "lm-eval", 2, parts)) and five.count("\n\n") == 5
    assert few_shot(HELLASWAG, "lm-eval", 0, Path("nowhere")) == ""


def test_no_exemplar_of_hellaswag_is_in_the_evaluated_split(hellaswag: Rows, parts: Path) -> None:
    exemplars = few_shot(HELLASWAG, "olmes", 5, parts).split("\n\n")[:-1]
    contexts = [question.context for question in questions(HELLASWAG, "olmes", hellaswag)]
    assert not [context for context in contexts if any(exemplar.startswith(context) for exemplar in exemplars)]


@pytest.mark.parametrize(
    ("task", "protocol"),
    [(task, how) for task in TASKS.values() for how in task.protocols if task is HELLASWAG or _own(task, how)],
)
def test_exemplars_are_put_in_the_words_of_the_question(task: Task, protocol: str, parts: Path) -> None:
    prefix = few_shot(task, protocol, 5, parts)
    shots = prefix.split("\n\n")
    assert len(shots) == 6 and shots[-1] == "" and prefix.startswith(few_shot(task, protocol, 2, parts))
    if task is HELLASWAG:
        return
    question = asked(task.name, protocol)[0]
    if "\nQuestion:" in question.context:
        last = question.context.splitlines()[-1]
        answers = [shot.rpartition(last)[2] for shot in shots[:-1]]
        assert set(answers) == {*question.endings} - ({" 3"} if task.name == "stsb" else set())
    else:
        openings = [shot.rpartition(", right?")[2].partition(",")[0] for shot in shots[:-1]]
        answers = openings
        assert set(openings) == {ending.partition(",")[0] for ending in question.endings}
    assert answers[0] != answers[1]


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte", "cb"])
def test_no_exemplar_of_ours_is_in_the_evaluated_split(name: str, parts: Path) -> None:
    task = TASKS[name]
    rows = read_rows(task, None, hub=False, parts=parts)
    prefix = few_shot(task, "lm-eval", 5, parts)
    assert not [question for question in questions(task, "lm-eval", rows) if question.context in prefix]


def test_more_shots_than_exemplars_are_refused_with_their_number(parts: Path) -> None:
    for task in TASKS.values():
        there = 5 if task is HELLASWAG or _own(task, task.protocols[0]) else 0
        for shots in (6, -1):
            with pytest.raises(UserError, match=f"shots: {shots} asked for, but {task.name} has {there} exemplars"):
                few_shot(task, task.protocols[0], shots, parts)
    assert {task.name for task in TASKS.values() if "olmes" in task.protocols} == set(OLMES_REQUESTS)
    with pytest.raises(UserError, match="piqa has 5 exemplars under olmes; choose 0 to 5"):
        few_shot(TASKS["piqa"], "olmes", 6, parts)


def test_damaged_or_absent_requests_are_named_with_the_mend(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"requests\.jsonl\.gz is not there; make it with: dvc repro fetch"):
        few_shot(HELLASWAG, "olmes", 5, tmp_path)
    copy = tmp_path / EVALUATION / OLMES_REQUESTS["hellaswag"]
    copy.parent.mkdir(parents=True)
    shutil.copy(parts / "manifest.json", tmp_path)
    copy.write_bytes((parts / EVALUATION / OLMES_REQUESTS["hellaswag"]).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"requests\.jsonl\.gz: damaged.*dvc repro -f -s fetch"):
        few_shot(HELLASWAG, "olmes", 5, tmp_path)


def test_unknown_and_unfitting_protocols_are_answered_with_those_that_fit() -> None:
    with pytest.raises(UserError, match="'lmeval' is not a protocol; choose of completion, lm-eval, olmes, question"):
        questions(HELLASWAG, "lmeval", Rows([], {}))
    with pytest.raises(UserError, match="rte cannot be asked as completion; choose of lm-eval"):
        questions(TASKS["rte"], "completion", Rows([], {}))
    with pytest.raises(UserError, match="snli cannot be asked as lm-eval; choose of question, infill"):
        few_shot(TASKS["snli"], "lm-eval", 1)


def test_infill_scores_the_sentences_of_xnli() -> None:
    for question, row in zip(asked("snli", "infill"), read_published(TASKS["snli"]).rows):
        openings = ("Yes", "Also", "No")
        whole = [f"{row['premise']}, right? {opening}, {row['hypothesis']}" for opening in openings]
        assert [question.context + ending for ending in question.endings] == whole
