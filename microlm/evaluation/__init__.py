"""Scores of any model: what is asked (tasks), how it is scored (scoring), what it means (results)."""

from microlm.runtime.paths import TRAINED_MODELS

SCORED_MODELS = (*TRAINED_MODELS, "teacher")  # by stage `evaluate`
GPT2_124M_ACC_NORM = 0.2955  # by the completion protocol; its source is in published.yaml
