"""Scores: tasks, the protocol they are read by, the engine that scores them, and what their errors are."""

from pathlib import Path

ARMS = ("control", "continued", "student")
MODELS = (*ARMS, "teacher")  # all that stage `evaluate` scores
GPT2_124M_ACC_NORM = 0.2955  # by the completion protocol; its source is in published.yaml
SCORES_DIRECTORY = Path("data/evaluation")  # <model>/items.parquet and windows.parquet
METRICS_DIRECTORY = Path("metrics")  # evaluation/<model>.json
