"""A loss of the user in the place of the one that `objective.name` names; the name decides what is computed for it
(`dispatch.needs`)."""

from collections.abc import Callable, Mapping
from functools import lru_cache

from torch import Tensor

from indexing.declare import refuse
from training.objectives.inputs import Likelihoods, Stats, entropy, retrieval_log_probs
from training.plug_ins import load_function

ObjectiveFunction = Callable[[Likelihoods, float], tuple[Tensor, Mapping[str, Tensor]]]
SETTING = "objective.function"
SIGNATURE = "(outputs: Likelihoods, temperature: float) -> tuple[Tensor, dict[str, Tensor]]"


@lru_cache
def load_objective(name: str) -> ObjectiveFunction:
    """Return the function that `objective.function` names.

    It gets the output of the models (`Likelihoods`: scores [batch, k], and the log-probabilities that `objective.name`
    needs) and the temperature of p(z|q). It returns the loss, a scalar with gradient that is summed over the questions
    and divided by `outputs.num_questions` (None: the batch), and metrics by name, scalars without gradient.

    Raises ValueError if it does not exist or takes other arguments.
    """
    allowed = "module:function or path/to/file.py:function"
    return load_function(SETTING, name, allowed=allowed, signature=SIGNATURE, num_arguments=2)


def user_objective(name: str, outputs: Likelihoods, temperature: float) -> tuple[Tensor, Stats]:
    """Return the loss of the function that `objective.function` names, and its statistics: `objective/<metric>` of each
    of its metrics, the loss, and the entropy of p(z|q). Raises ValueError if it returns something else."""
    returned = load_objective(name)(outputs, temperature)
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
        raise refuse(SETTING, name, f"must return a loss and metrics, {SIGNATURE}, not {type(returned).__name__}")
    loss, metrics = returned
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise refuse(SETTING, name, "must return as loss a scalar tensor with gradient")
    for key, value in metrics.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise refuse(SETTING, name, f"must return scalar tensors as metrics, but {key} is {value!r}")
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature).detach()
    stats = {"loss/objective": loss.detach(), "retrieval/entropy": entropy(prior, outputs.passage_mask)}
    return loss, stats | {f"objective/{key}": value.detach().reshape(()) for key, value in metrics.items()}
