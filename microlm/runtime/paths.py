"""Where the stages leave what they make, relative to the folder in which they run: each place is named here alone."""

from pathlib import Path

DATA, MODELS, METRICS, PLOTS = Path("data"), Path("models"), Path("metrics"), Path("plots")
PARTS = DATA / "parts"  # packaged text, teacher and evaluation data
SHARDS = DATA / "shards"
OUTSIDE = DATA / "outside"  # shards of one split, `outside`: text of another kind than the corpus
CACHE = DATA / "teacher"
WINDOWS = DATA / "windows.npy"  # that the continuations train on
SCORES = DATA / "evaluation"  # <model>/: a table for each benchmark, windows.parquet
CARD = "README.md"  # beside the weights of a model, written by another stage than they
START, CONTROL = MODELS / "start", MODELS / "control"
# the stage that makes models/<name>, metrics/<name>.json and the curves of each
TRAINED_MODELS = {"control": "pretrain", "continued": "continue", "student": "distill"}
DVC_COPIES = ".dvc/tmp/exps"


def seen_from() -> str:
    """Where a relative path was looked for, for a message about one that is not there."""
    here = Path.cwd()
    if DVC_COPIES not in here.as_posix():
        return f"seen from {here}"
    mend = "give an absolute path, or have Git or DVC track what it names"
    return f"seen from {here}, the copy that `dvc exp run --temp` and `--queue` work in: {mend}"
