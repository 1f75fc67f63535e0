"""Refuses an objective's settings before any model loads; imports nothing heavy."""

from indexing.declare import check_values, refuse
from training.training_settings import PREFERENCE, SAMPLING, ObjectiveConfig

LIKELIHOOD_REWARD = "likelihood"  # reinforce over passages alone, with the gold answer
REWARDS = (LIKELIHOOD_REWARD, "exact_match", "f1", "grounded")
REWARD_VALUES = f"{', '.join(REWARDS[1:])}, module:function or path/to/file.py:function"


def check_objective(config: ObjectiveConfig) -> None:
    """Raise ValueError, naming the setting, its value and the allowed ones, if a setting is not allowed."""
    check_values(config, "objective.")
    if config.max_span < config.min_span:
        allowed = f"must not exceed objective.max_span={config.max_span}"
        raise refuse("objective.min_span", config.min_span, allowed)
    if config.name in PREFERENCE + SAMPLING:
        _check_alignment(config)


def samples_answers(config: ObjectiveConfig) -> bool:
    """Return true if the generator writes the answers that are trained on."""
    return config.name == "grpo" or (config.name == "reinforce" and config.reward != LIKELIHOOD_REWARD)


def needs_reference(config: ObjectiveConfig) -> bool:
    """Return true if the loss compares with the system at the start of the stage."""
    return config.name in PREFERENCE or (samples_answers(config) and config.kl_weight > 0)


def _check_alignment(config: ObjectiveConfig) -> None:
    if config.name in ("reinforce", "grpo") and config.group_size < 2:
        allowed = "must be 2 or above: the advantage of a sample compares it with the others of its group"
        raise refuse("objective.group_size", config.group_size, allowed)
    if config.name == "grpo" and config.reward == LIKELIHOOD_REWARD:
        raise refuse("objective.reward", config.reward, f"must be {REWARD_VALUES} with objective.name=grpo")
    if config.name in ("reinforce", "grpo") and config.reward not in REWARDS and not _is_function(config.reward):
        raise refuse("objective.reward", config.reward, f"must be {REWARD_VALUES}, or likelihood with reinforce")


def _is_function(reward: str) -> bool:
    place, colon, name = reward.rpartition(":")
    return bool(colon and place and name.isidentifier())
