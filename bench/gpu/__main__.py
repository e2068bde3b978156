"""python -m bench.gpu: the wheels of the bundle first, then everything that may need them."""

import sys

if __name__ == "__main__":
    try:
        from bench.gpu import unpack

        unpack.put_wheels_on_path()
        import torch  # noqa: F401 - without which transformers complains in words of its own
        import transformers  # noqa: F401 - which the parts import each by itself, later

        from bench.gpu.command import run
    except ModuleNotFoundError as absent:
        sys.exit(
            f"error: {absent.name} is not installed for {sys.executable}; bench/README.md lists what a machine needs; "
            "all of it comes with: make setup && . .venv/bin/activate"
        )
    run()
