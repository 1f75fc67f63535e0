"""Refuses an objective's settings before any model loads; imports nothing heavy."""

from math import isfinite

from training.settings import ObjectiveConfig

GENERATIVE = ("rag_sequence", "rag_token", "realm", "emdr2", "pdist", "loop", "adist", "fused")
CONTRASTIVE = ("inverse_cloze", "independent_cropping")


def check_objective(config: ObjectiveConfig) -> None:
    """Raises ValueError that names the setting, its value and what is allowed."""
    _one_of("name", config.name, GENERATIVE + CONTRASTIVE)
    _one_of("level", config.level, ("sequence", "token"))
    _one_of("normalization", config.normalization, ("length", "none"))
    _one_of("reduction", config.reduction, ("batch", "elements"))
    _one_of("null_score", config.null_score, ("learned", "fixed"))
    _require("temperature", config.temperature, config.temperature > 0, "above 0")
    _require("target_temperature", config.target_temperature, config.target_temperature > 0, "above 0")
    _require("scale", config.scale, config.scale > 0, "above 0")
    _require("weight", config.weight, config.weight >= 0, "0 or above")
    _require("keep_probability", config.keep_probability, 0 <= config.keep_probability <= 1, "between 0 and 1")
    _require("title_probability", config.title_probability, 0 <= config.title_probability <= 1, "between 0 and 1")
    _require("drop_probability", config.drop_probability, 0 <= config.drop_probability < 1, "0 or above and below 1")
    _require("min_span", config.min_span, config.min_span >= 1, "1 or above")
    _require("max_span", config.max_span, config.max_span >= config.min_span, f"min_span={config.min_span} or above")


def _one_of(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError when `value` is none of `allowed`."""
    if value not in allowed:
        raise ValueError(f"objective.{setting}={value!r}: allowed are {', '.join(allowed)}")


def _require(setting: str, value: float, holds: bool, allowed: str) -> None:
    """Raises ValueError unless the condition holds and the value is a finite number."""
    if not (holds and isfinite(value)):
        raise ValueError(f"objective.{setting}={value}: must be a finite number, {allowed}")
