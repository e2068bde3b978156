"""Text to tokens: packaged parts, sources of documents, tokenizers, shards of tokens, batches of windows."""
