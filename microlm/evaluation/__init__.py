"""Scores: tasks, the protocol they are read by, the engine that scores them, and what their errors are."""

from pathlib import Path

ARMS = ("control", "continued", "student")
MODELS = (*ARMS, "teacher")  # all that stage `evaluate` scores
SCORES_DIRECTORY = Path("data/evaluation")  # <model>/items.parquet and windows.parquet
METRICS_DIRECTORY = Path("metrics")  # evaluation/<model>.json
