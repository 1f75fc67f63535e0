"""From an objective's settings to its function: one `match` says what it needs, one computes it.

A new objective is a pure function in the file of its family and one case in each of the two.
"""

from jaxtyping import Float
from torch import Tensor

from training.objectives.check import check_objective, samples_answers
from training.objectives.contrastive import info_nce
from training.objectives.distillation import adist, emdr2, loop, pdist
from training.objectives.inputs import Likelihoods, Needs, Stats
from training.objectives.marginal import fused_likelihood, rag_sequence, rag_token, realm
from training.objectives.preference import Candidates, Reduce, dpo, kto, sum_over_ranks
from training.objectives.sampling import grpo, reinforce, reinforce_passages, stochastic_rag
from training.objectives.user_objective import user_objective
from training.training_settings import ObjectiveConfig


def needs(config: ObjectiveConfig) -> Needs:
    """Return what has to be computed for this objective. Raises ValueError for settings that are not allowed."""
    check_objective(config)
    match config.name:
        # marginal.py: gradient to the generator and to both encoders
        case "rag_sequence" | "rag_token":
            return Needs(per_passage=True, per_passage_gradient=True)
        case "realm":
            return Needs(per_passage=True, per_passage_gradient=True, null=True)
        case "fused":
            return Needs(fused=True, score_bias=config.score_bias)
        # distillation.py: the generator learns from its fused likelihood, the retriever from a detached target
        case "emdr2" | "pdist":
            return Needs(fused=True, per_passage=True)
        case "loop":
            return Needs(fused=True, left_out=True)
        case "adist":
            return Needs(fused=True, attention=True)
        # contrastive.py: no generator
        case "inverse_cloze" | "independent_cropping":
            return Needs(in_batch=True)
        # preference.py, sampling.py: several answers to each question, or several draws of passages
        case "dpo" | "kto":
            return Needs(candidates=True)
        case "reinforce" | "grpo" if samples_answers(config):
            return Needs(candidates=True)
        case "reinforce":
            return Needs(per_passage=True, per_passage_gradient=True, num_draws=config.group_size)
        case "stochastic_rag":
            return Needs(per_passage=True, per_passage_gradient=True, num_draws=1)
        case _:
            raise AssertionError(f"check_objective let {config.name!r} through")


def compute(
    config: ObjectiveConfig, outputs: Likelihoods, reduce: Reduce = sum_over_ranks
) -> tuple[Float[Tensor, ""], Stats]:
    """Return the loss, a scalar times `config.scale`, and detached statistics (`loss/*` before the scale).

    The loss always depends on the scores, with gradient 0 if the objective gives none: a rank whose graph never touches
    the retriever would make the collectives of ZeRO disagree. `reduce` sums over ranks the values that one of them
    cannot know alone.
    """
    match config.name:
        case _ if config.function:
            loss, stats = user_objective(config.function, outputs, config.temperature)
        case "rag_sequence":
            loss, stats = rag_sequence(outputs, config.temperature)
        case "rag_token":
            loss, stats = rag_token(outputs, config.temperature)
        case "realm":
            loss, stats = realm(outputs, config.temperature)
        case "fused":
            loss, stats = fused_likelihood(outputs, config.temperature)
        case "emdr2":
            loss, stats = emdr2(outputs, config.level, config.weight, config.temperature)
        case "pdist":
            loss, stats = pdist(outputs, config.normalization, *_distillation(config))
        case "loop":
            loss, stats = loop(outputs, *_distillation(config))
        case "adist":
            loss, stats = adist(outputs, *_distillation(config))
        case "inverse_cloze" | "independent_cropping":
            loss, stats = info_nce(outputs, config.temperature)
        case "dpo":
            loss, stats = dpo(
                _candidates(outputs),
                config.beta,
                chosen_weight=config.chosen_weight,
                length_normalized=config.length_normalized,
                temperature=config.temperature,
            )
        case "kto":
            weights = (config.desirable_weight, config.undesirable_weight)
            loss, stats = kto(
                _candidates(outputs), config.beta, *weights, config.length_normalized, config.temperature, reduce
            )
        case "grpo":
            loss, stats = grpo(
                _candidates(outputs),
                config.clip,
                kl_weight=config.kl_weight,
                advantage=config.advantage,
                temperature=config.temperature,
            )
        case "reinforce" if samples_answers(config):
            loss, stats = reinforce(_candidates(outputs), config.kl_weight, config.advantage, config.temperature)
        case "reinforce":
            loss, stats = reinforce_passages(outputs, config.advantage, config.temperature)
        case "stochastic_rag":
            loss, stats = stochastic_rag(outputs, config.num_selected, config.relaxation, config.temperature)
        case _:
            raise AssertionError(f"check_objective let {config.name!r} through")
    if outputs.contrast is not None:
        pairs, known = info_nce(outputs.contrast)
        loss = (1 - outputs.contrast_share) * loss + outputs.contrast_share * pairs
        stats |= {"loss/contrast": pairs.detach(), "retrieval/in_batch_accuracy": known["retrieval/in_batch_accuracy"]}
    touch = (0.0 * outputs.scores.masked_fill(~outputs.passage_mask, 0.0)).sum()
    return config.scale * (loss + touch), stats


def _distillation(config: ObjectiveConfig) -> tuple[str, float, float, float, bool]:
    """Return the settings that pdist, loop and adist share."""
    return config.reduction, config.weight, config.temperature, config.target_temperature, config.confidence


def _candidates(outputs: Likelihoods) -> Candidates:
    assert isinstance(outputs, Candidates)
    return outputs
