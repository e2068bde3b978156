"""The control: a student from scratch under cross-entropy."""

from microlm.pipeline import configured
from microlm.pipeline.training_stages import most_processes, pretrain
from microlm.runtime.launcher import run_shared_stage

if __name__ == "__main__":
    run_shared_stage(lambda: pretrain(*configured()), most_processes)
