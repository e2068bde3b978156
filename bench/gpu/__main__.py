"""python -m bench.gpu: the wheels of the bundle first, then everything that may need them."""

from bench.gpu import unpack

if __name__ == "__main__":
    unpack.put_wheels_on_path()
    from bench.gpu.command import run

    run()
