"""Text to tokens: packaged parts, sources of documents, tokenizers, shards, windows. No model."""
