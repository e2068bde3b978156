"""`python -m microlm` is `microlm`."""

from microlm.cli import main

main()
