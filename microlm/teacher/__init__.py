"""The teacher, run once and remembered on disk, or live; and seen in other tokens than its own. No loss."""
