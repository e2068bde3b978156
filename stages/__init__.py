"""One thin program for each stage, run as `python -m stages.<name>`."""

from microlm.errors import tell_early_interrupts

tell_early_interrupts()
