"""Refuses an objective's settings before any model loads; imports nothing heavy."""

from math import isfinite

from training.training_settings import ObjectiveConfig

GENERATIVE = ("rag_sequence", "rag_token", "realm", "emdr2", "pdist", "loop", "adist", "fused")
CONTRASTIVE = ("inverse_cloze", "independent_cropping")
PREFERENCE = ("dpo", "kto")
SAMPLING = ("stochastic_rag", "reinforce", "grpo")
LIKELIHOOD_REWARD = "likelihood"  # reinforce over passages alone, with the gold answer
REWARDS = (LIKELIHOOD_REWARD, "exact_match", "f1", "grounded")


def check_objective(config: ObjectiveConfig) -> None:
    """Raises ValueError that names the setting, its value and what is allowed."""
    _one_of("name", config.name, GENERATIVE + CONTRASTIVE + PREFERENCE + SAMPLING)
    _one_of("level", config.level, ("sequence", "token"))
    _one_of("normalization", config.normalization, ("length", "none"))
    _one_of("reduction", config.reduction, ("batch", "elements"))
    _one_of("null_score", config.null_score, ("learned", "fixed"))
    _one_of("advantage", config.advantage, ("normalized", "centered"))
    _require("temperature", config.temperature, config.temperature > 0, "above 0")
    _require("target_temperature", config.target_temperature, config.target_temperature > 0, "above 0")
    _require("scale", config.scale, config.scale > 0, "above 0")
    _require("weight", config.weight, config.weight >= 0, "0 or above")
    _require("keep_probability", config.keep_probability, 0 <= config.keep_probability <= 1, "between 0 and 1")
    _require("title_probability", config.title_probability, 0 <= config.title_probability <= 1, "between 0 and 1")
    _require("drop_probability", config.drop_probability, 0 <= config.drop_probability < 1, "0 or above and below 1")
    _require("min_span", config.min_span, config.min_span >= 1, "1 or above")
    _require("max_span", config.max_span, config.max_span >= config.min_span, f"min_span={config.min_span} or above")
    if config.name in PREFERENCE + SAMPLING:
        _check_alignment(config)


def samples_answers(config: ObjectiveConfig) -> bool:
    """Whether the generator writes the answers that are trained on."""
    return config.name == "grpo" or (config.name == "reinforce" and config.reward != LIKELIHOOD_REWARD)


def needs_reference(config: ObjectiveConfig) -> bool:
    """Whether the loss compares with the system at the start of the stage."""
    return config.name in PREFERENCE or (samples_answers(config) and config.kl_weight > 0)


def _check_alignment(config: ObjectiveConfig) -> None:
    for setting in ("beta", "clip", "relaxation", "sampling_temperature"):
        _require(setting, vars(config)[setting], vars(config)[setting] > 0, "above 0")
    for setting in ("kl_weight", "chosen_weight", "desirable_weight", "undesirable_weight"):
        _require(setting, vars(config)[setting], vars(config)[setting] >= 0, "0 or above")
    _require("num_selected", config.num_selected, config.num_selected >= 1, "1 or above")
    if config.name in ("reinforce", "grpo") and config.group_size < 2:
        allowed = "must be 2 or above: the advantage of a sample compares it with the others of its group"
        raise ValueError(f"objective.group_size={config.group_size}: {allowed}")
    if config.name == "grpo" and config.reward == LIKELIHOOD_REWARD:
        allowed = "allowed with objective.name=grpo are exact_match, f1, grounded, module:function, file.py:function"
        raise ValueError(f"objective.reward={config.reward!r}: {allowed}")
    if config.name in ("reinforce", "grpo") and config.reward not in REWARDS and not _is_function(config.reward):
        allowed = f"allowed are {', '.join(REWARDS)}, module:function, path/to/file.py:function"
        raise ValueError(f"objective.reward={config.reward!r}: {allowed}")


def _is_function(reward: str) -> bool:
    place, colon, name = reward.rpartition(":")
    return bool(colon and place and name.isidentifier())


def _one_of(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError when `value` is none of `allowed`."""
    if value not in allowed:
        raise ValueError(f"objective.{setting}={value!r}: allowed are {', '.join(allowed)}")


def _require(setting: str, value: float, holds: bool, allowed: str) -> None:
    """Raises ValueError unless the condition holds and the value is a finite number."""
    if not (holds and isfinite(value)):
        raise ValueError(f"objective.{setting}={value}: must be a finite number, {allowed}")
