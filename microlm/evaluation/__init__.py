"""Scores of any model: what is asked (tasks), how it is scored (scoring), what it means (results)."""

ARMS = ("control", "continued", "student")
MODELS = (*ARMS, "teacher")  # all that stage `evaluate` scores
GPT2_124M_ACC_NORM = 0.2955  # by the completion protocol; its source is in published.yaml
