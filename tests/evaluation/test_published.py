"""What others published is well-formed, says where it is from, and is consistent with itself."""

import math
from pathlib import Path

import pytest

from microlm.errors import UserError
from microlm.evaluation import GPT2_124M_ACC_NORM
from microlm.evaluation.tasks.task import TASKS
from microlm.report.evaluation_table import Figure, published_figures, worth_showing
from tests.support.toy_results import toy_result

LINE = """figures:
  - {model: gpt2, task: hellaswag, metric: acc, value: 0.3, shots: 0, protocol: p, source: s, checked: second hand}
"""


@pytest.fixture(scope="module")
def figures() -> list[Figure]:
    return published_figures()


def test_every_figure_is_read_once_from_one_source(figures: list[Figure]) -> None:
    assert len(figures) > 60
    keys = [(f.model, f.task, f.metric, f.protocol, f.shots, f.source) for f in figures]
    assert len(set(keys)) == len(keys)


def test_errors_on_full_splits_are_those_of_their_accuracy(figures: list[Figure]) -> None:
    checked = 0
    for figure in figures:
        task = TASKS.get(figure.task)
        if figure.error and task and figure.metric.startswith("acc") and figure.checked == "read at the source":
            n = task.published
            assert figure.error == pytest.approx(math.sqrt(figure.value * (1 - figure.value) / (n - 1)), rel=1e-3)
            checked += 1
    assert checked >= 10


def test_the_reference_line_of_the_pipeline_is_among_them(figures: list[Figure]) -> None:
    found = worth_showing(figures, [toy_result("hellaswag", "models/student")])
    assert {(f.task, f.protocol, f.shots) for f in found} == {("hellaswag", "completion", 0)}
    of_gpt2 = [f.value for f in found if (f.model, f.metric) == ("gpt2", "acc_norm")]
    assert of_gpt2[0] == GPT2_124M_ACC_NORM


def test_a_model_s_figures_by_other_protocols_share_its_row(figures: list[Figure]) -> None:
    found = worth_showing(figures, [toy_result("hellaswag", "Qwen/Qwen2.5-1.5B@8faed76", protocol="lm-eval", shots=5)])
    assert {f.model for f in found} == {"Qwen/Qwen2.5-1.5B@8faed76"}
    assert {(f.protocol, f.shots) for f in found} == {("Qwen blog", 10), ("lighteval", 0)}
    assert worth_showing(figures, [toy_result("mrpc", "gpt2", shots=5)]) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("value: 0.3", "value: 30.0", r"figures\[0\]\.value: 30\.0 is out of range"),
        ("shots: 0, ", "", r"figures\[0\]\.shots: missing"),
        ("second hand", "perhaps", r"figures\[0\]\.checked: 'perhaps' is not one of"),
        ("source: s", "sauce: s", r"figures\[0\]\.sauce: unknown key"),
        ("}", "", "not readable as YAML"),
    ],
)
def test_a_wrong_figure_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(LINE.replace(old, new))
    with pytest.raises(UserError, match=named):
        published_figures(path)


def test_a_right_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(LINE.replace("shots: 0", "shots: null"))
    (figure,) = published_figures(tmp_path / "published.yaml")
    assert (figure.value, figure.shots, figure.error) == (0.3, None, None)
