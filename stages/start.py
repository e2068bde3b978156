"""The control's first weights: fresh, with the teacher's embedding, or cut out of the teacher -> models/start."""

from microlm.errors import run_stage
from microlm.pipeline import configured
from microlm.pipeline.start import make_start

if __name__ == "__main__":
    run_stage(lambda: make_start(*configured()))
