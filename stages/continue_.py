"""The matched control: the control continued under cross-entropy on the windows the student sees."""

from microlm.pipeline import configured
from microlm.pipeline.training_stages import continue_control, most_processes
from microlm.runtime.launcher import run_shared_stage

if __name__ == "__main__":
    run_shared_stage(lambda: continue_control(*configured(continuing=True)), most_processes)
