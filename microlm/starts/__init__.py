"""First weights that know something: a student cut out of its teacher, or given its embedding."""

from pathlib import Path

START = Path("models/start")
