"""Commands of `microlm` that are more than a call: what a person asks of one model or several, beside the pipeline."""
