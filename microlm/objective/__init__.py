"""What is minimized: divergences, and the LM head fused with them."""
