"""What is minimized: divergences from partial records, and the LM head fused with them. No file, no parameter."""
