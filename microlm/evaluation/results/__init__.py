"""What it means: answers, metrics with errors, resampling, comparison of models, results on disk. No model."""
