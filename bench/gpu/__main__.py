"""python -m bench.gpu: the wheels of the bundle first, then everything that may need them."""

import sys

if __name__ == "__main__":
    try:
        from bench.gpu import unpack

        unpack.put_wheels_on_path()
        from bench.gpu.command import run
    except ModuleNotFoundError as absent:
        sys.exit(
            f"error: {absent.name} is not installed for {sys.executable}; bench/README.md lists what a machine needs; "
            "all of it comes with: make setup && . .venv/bin/activate"
        )
    run()
