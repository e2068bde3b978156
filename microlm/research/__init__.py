"""What is asked about the pipeline: probe (what a cache loses), ledger and plan (what it costs), the studies."""
