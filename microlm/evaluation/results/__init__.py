"""What it means: answers, metrics with errors, statistics, comparison of models, results on disk. No model."""
