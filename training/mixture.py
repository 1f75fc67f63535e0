"""The mixture of pretraining tasks; read before a stage starts, so nothing heavy is imported."""

from training.settings import PretrainingConfig

TASKS = ("span_corruption", "salient_span", "prefix_lm", "title_to_section")


def pretrains(config: PretrainingConfig) -> bool:
    """Whether the stage trains on examples cut from the corpus: some task has a weight."""
    return any(getattr(config, task) is not None for task in TASKS)


def mixture(config: PretrainingConfig) -> dict[str, float]:
    """Share of each task, in the order of `TASKS`; those of weight 0 are left out. Raises ValueError where a weight is
    negative or all are 0."""
    weights = {task: getattr(config, task) for task in TASKS if getattr(config, task) is not None}
    for task, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"pretraining.{task}={weight}: must be a weight of 0 or above")
    total = sum(weights.values())
    if not total:
        given = ", ".join(f"pretraining.{task}={weight}" for task, weight in weights.items())
        raise ValueError(f"{given}: the weights of the mixture are 0 together; set one above 0, or none at all")
    return {task: weight / total for task, weight in weights.items() if weight}
