"""How it is scored: ids, shared prefixes, batches, the engine; bits per byte of held-out text. No accuracy."""
