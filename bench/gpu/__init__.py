"""What one GPU does with this project, by one command: python -m bench.gpu (see bench/README.md)."""
