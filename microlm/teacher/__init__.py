"""The teacher: run once, remembered on disk."""
