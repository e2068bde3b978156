"""The student: the control continued under (1 - alpha) CE + alpha D from the teacher's cache."""

from microlm.pipeline import configured
from microlm.pipeline.training_stages import distill, most_processes
from microlm.runtime.launcher import run_shared_stage

if __name__ == "__main__":
    run_shared_stage(lambda: distill(*configured(continuing=True)), most_processes)
