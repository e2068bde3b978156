"""The objective that params.yaml asks for."""

from microlm.config import Config
from microlm.objective.schedule import AlphaSchedule, ObjectiveSchedule


def objective_schedule(config: Config) -> ObjectiveSchedule:
    """What params.yaml asks for."""
    rates = config.at.pretrain if config.init == "scratch" else config.at.continuation
    alpha = AlphaSchedule(
        config.alpha_schedule, config.alpha, config.alpha_final, rates.warmup_fraction, rates.decay_fraction
    )
    parameter = {"jsd": config.beta, "skew_rkl": config.skew, "skew_fkl": config.skew}.get(config.objective)
    return ObjectiveSchedule(config.objective, alpha, config.temperature, parameter, config.tail, rates.z_loss)
