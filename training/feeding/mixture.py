"""The mixture of pretraining tasks; read before a stage starts, so nothing heavy is imported.

Tasks that cut a question and an answer are drawn one by one, example by example. Contrastive tasks train the retriever
alone: where the mixture has one, every micro-batch brings a batch of pairs beside its examples, and the loss is the
mean of both, weighted by their shares, so that every trainer's graph is the same at every step.
"""

from indexing.declare import refuse
from training.example_settings import PretrainingConfig
from training.training_settings import CONTRASTIVE

TASKS = ("span_corruption", "salient_span", "prefix_lm", "title_to_section")


def pretrains(config: PretrainingConfig) -> bool:
    """Return whether the stage trains on examples cut from the corpus: some task has a weight."""
    return any(getattr(config, task) is not None for task in (*TASKS, *CONTRASTIVE))


def mixture(config: PretrainingConfig) -> dict[str, float]:
    """Return the share of each task, in the order of `TASKS` and `CONTRASTIVE`, without those of weight 0. Raises
    ValueError if a weight is negative, all are 0, or no task has an answer."""
    weights = {task: getattr(config, task) for task in (*TASKS, *CONTRASTIVE) if getattr(config, task) is not None}
    for task, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise refuse(f"pretraining.{task}", weight, "must be a weight of 0 or above")
    total = sum(weights.values())
    if not total:
        given = ", ".join(f"pretraining.{task}={weight}" for task, weight in weights.items())
        raise ValueError(f"{given}: the weights of the mixture are 0 together; set one above 0, or none at all")
    if not any(weights.get(task) for task in TASKS):
        raise ValueError(
            f"pretraining has weights for {', '.join(weights)} alone, which have no answers: give one of "
            f"{', '.join(TASKS)} a weight, or set objective.name={next(task for task in weights if weights[task])}"
        )
    return {task: weight / total for task, weight in weights.items() if weight}


def answered(config: PretrainingConfig) -> dict[str, float]:
    """Return the share of each task with answers among those with answers."""
    shares = {task: share for task, share in mixture(config).items() if task in TASKS}
    return {task: share / sum(shares.values()) for task, share in shares.items()}


def contrasted(config: PretrainingConfig) -> dict[str, float]:
    """Return the share of each contrastive task in the whole mixture; empty if it has none."""
    return {task: share for task, share in mixture(config).items() if task in CONTRASTIVE}
