"""What the stages of dvc.yaml run: the rooms above, assembled over the files of runtime/paths.py. No arithmetic."""

from microlm.config import Config, load_config
from microlm.runtime.device import Runtime, set_up


def configured(continuing: bool = False) -> tuple[Config, Runtime]:
    """params.yaml, and this machine set up as it asks; `continuing` with the dtype that `continuation` may ask for."""
    config = load_config()
    return config, set_up(config.continuation_runtime if continuing else config.at.runtime)
