"""The windows that `continue` and `distill` train on: data/windows.npy and metrics/windows.json."""

from microlm.errors import run_stage
from microlm.pipeline import configured
from microlm.pipeline.select import select_windows

if __name__ == "__main__":
    run_stage(lambda: select_windows(*configured()))
