"""The teacher, once, over the windows that students will see: data/teacher and metrics/teacher.json."""

from microlm.pipeline import configured
from microlm.pipeline.capture import capture_teacher
from microlm.runtime.launcher import run_shared_stage

if __name__ == "__main__":
    run_shared_stage(lambda: capture_teacher(*configured()))
