"""Checks a resolved configuration for allowed values, ranges, and settings that contradict each other.

Every refusal is one ValueError that names the setting, its value and the allowed values. The code that opens a file
refuses a missing one. The values that a setting may have by itself are declared in its field.
"""

import re

from cluster.config.hybrid_settings import check_hybrid
from cluster.config.settings import Settings
from indexing.corpus.stores.filters import parse_filter
from indexing.declare import check_values, refuse
from indexing.dense.kinds import check_gpu_kind, check_products, parse
from indexing.indexing_settings import IndexConfig
from training.feeding.mixture import contrasted, mixture, pretrains
from training.generator_kinds import GENERATOR_KINDS
from training.objectives.check import check_objective, needs_reference, samples_answers
from training.training_settings import (
    CONTRASTIVE,
    FRESH_CONTEXT,
    PREFERENCE,
    SAMPLING,
    TRAINS_RETRIEVER,
    ObjectiveConfig,
)


def validate(settings: Settings) -> None:
    """Check one resolved run. Raises ValueError."""
    check_values(settings)
    _check_texts(settings)
    _check_models(settings)
    _check_objective(settings)
    _check_context(settings)
    _check_alignment(settings)
    _check_index(settings)
    _check_refresh(settings)
    _check_slow(settings.index)
    _check_questions(settings)
    _check_pretraining(settings)
    check_hybrid(settings)


def _check_texts(settings: Settings) -> None:
    for setting, template, needed in (
        ("generator.template", settings.generator.template, ("{passages}", "{question}")),
        ("generator.passage_template", settings.generator.passage_template, ("{text}",)),
    ):
        missing = [part for part in needed if part not in template]
        if missing:
            raise refuse(setting, repr(template), f"must contain {' and '.join(missing)}")


def _check_models(settings: Settings) -> None:
    for section in ("encoder", "generator", "reranker"):
        fresh = vars(settings)[section].fresh
        if not vars(settings)[section].name and fresh.hidden % fresh.num_heads:
            raise refuse(f"{section}.fresh.hidden", fresh.hidden, f"must be a multiple of num_heads={fresh.num_heads}")
    fresh = settings.generator.fresh
    if settings.generator.traits.one_sequence and not settings.generator.name and fresh.hidden % (2 * fresh.num_heads):
        allowed = (
            f"must be a multiple of 2 * num_heads={2 * fresh.num_heads} with generator.kind={settings.generator.kind}"
        )
        raise refuse("generator.fresh.hidden", fresh.hidden, allowed)
    _check_lora(settings)
    if settings.engine.offload_optimizer and settings.engine.zero_stage == 0:
        raise refuse("engine.offload_optimizer", "true", "must be false with engine.zero_stage=0")


def _check_lora(settings: Settings) -> None:
    generator = settings.generator
    if generator.lora.rank and not generator.traits.adapters:
        raise refuse("generator.lora.rank", generator.lora.rank, f"must be 0 with generator.kind={generator.kind}")
    for section, model in (("encoder", settings.encoder), ("generator", settings.generator)):
        lora = model.lora
        if not lora.rank:
            continue
        if not model.name and not settings.run.init_from:
            allowed = f"must be 0, or {section}.name or run.init_from given: adapters do not train random weights"
            raise refuse(f"{section}.lora.rank", lora.rank, allowed)
        if lora.dropout == 1:
            raise refuse(f"{section}.lora.dropout", lora.dropout, "must be below 1")
        if not lora.target_modules or ("auto" in lora.target_modules and len(lora.target_modules) > 1):
            allowed = "must be [auto] or names of layers"
            raise refuse(f"{section}.lora.target_modules", lora.target_modules, allowed)


def _has_score_bias(objective: ObjectiveConfig) -> bool:
    return objective.name == "fused" and objective.score_bias


def _check_objective(settings: Settings) -> None:
    objective, train = settings.objective, settings.training.train
    if objective.min_span > objective.max_span:
        raise refuse(
            "objective.min_span", objective.min_span, f"must not exceed objective.max_span={objective.max_span}"
        )
    if objective.name in CONTRASTIVE:
        if train in ("both", "generator_only"):
            allowed = "must be retriever_only, query_only or none"
            raise refuse(
                "training.train", train, f"{allowed} with objective.name={objective.name}, which has no generator"
            )
        return
    if _has_score_bias(objective) and not settings.generator.traits.score_bias:
        fitting = " or ".join(name for name, kind in GENERATOR_KINDS.items() if kind.score_bias)
        allowed = f"must be {fitting} with objective.name=fused and objective.score_bias=true"
        why = f"a {settings.generator.kind} model takes no bias per passage"
        raise refuse("generator.kind", settings.generator.kind, f"{allowed} ({why})")
    _check_attention(settings)
    if train not in TRAINS_RETRIEVER:
        return
    delay, steps = settings.training.retriever_delay_steps, settings.training.steps
    if delay and delay >= steps:
        raise refuse("training.retriever_delay_steps", delay, f"must be below training.steps={steps}")
    if objective.name == "fused" and not objective.score_bias:
        allowed = "must be true, or training.train must be generator_only: without it no gradient reaches the retriever"
        raise refuse("objective.score_bias", "false", allowed)
    if settings.retrieval.source in ("none", "long"):
        allowed = f"must be index or gold with training.train={train}: the retriever learns from passages"
        raise refuse("retrieval.source", settings.retrieval.source, allowed)
    if settings.retrieval.source == "fixed":
        allowed = f"must be index with training.train={train}, or training.train generator_only: a fixed index does not"
        raise refuse("retrieval.source", "fixed", f"{allowed} follow a retriever that trains")


def _check_context(settings: Settings) -> None:
    """Refuse sources of passages and long prompts that cannot be."""
    retrieval, evaluation, needle = settings.retrieval, settings.evaluation, settings.evaluation.needle
    if settings.objective.name in CONTRASTIVE:
        return
    if retrieval.source == "long":
        if evaluation.decoding.mode != "fused":
            raise refuse(
                "evaluation.decoding.mode", evaluation.decoding.mode, "must be fused with retrieval.source=long"
            )
        if settings.training.train != "none" and (settings.objective.name != "fused" or settings.objective.score_bias):
            allowed = "must be fused with objective.score_bias=false where retrieval.source=long trains: one prompt"
            raise refuse("objective.name", settings.objective.name, f"{allowed} of all passages, none of them scored")
    if bool(needle.lengths) != bool(needle.depths):
        missing = "depths" if needle.lengths else "lengths"
        raise refuse(f"evaluation.needle.{missing}", "[]", "lengths and depths must both be given, or neither")
    for name, values in (("lengths", needle.lengths), ("depths", needle.depths)):
        if len(set(values)) < len(values):
            raise refuse(f"evaluation.needle.{name}", values, "must name each value once")
    fresh_causal = settings.generator.traits.one_sequence and not settings.generator.name
    budgets = {"evaluation.needle.lengths": max(needle.lengths, default=0)}
    if retrieval.source == "long" or "long" in evaluation.also:
        budgets["retrieval.max_context_tokens"] = retrieval.max_context_tokens
        if not settings.generator.traits.one_sequence and not retrieval.max_context_tokens:
            allowed = (
                f"must be set for long prompts with generator.kind={settings.generator.kind}, which names no limit"
            )
            raise refuse("retrieval.max_context_tokens", 0, allowed)
    for setting, tokens in budgets.items():
        if fresh_causal and tokens > FRESH_CONTEXT:
            raise refuse(setting, tokens, f"must be at most {FRESH_CONTEXT}, the context of a fresh causal model")


def _check_attention(settings: Settings) -> None:
    """Refuse an attention kernel that hides what the objective reads or changes. Files say if a checkpoint attends."""
    name, generator = settings.objective.name, settings.generator
    reads = name == "adist" and generator.traits.checkpoint != "encoder"
    bends = name == "loop" and generator.traits.encoder_decoder
    if generator.attention == "flash_attention_2" and (reads or bends):
        allowed = f"must be auto, eager or sdpa with objective.name={name}, which needs attention by token"
        raise refuse("generator.attention", generator.attention, allowed)


def _check_alignment(settings: Settings) -> None:
    objective, alignment = settings.objective, settings.alignment
    if objective.name not in (*PREFERENCE, *SAMPLING):
        return
    check_objective(objective)
    if objective.name == "stochastic_rag" and objective.num_selected >= settings.retrieval.k:
        allowed = f"must be below retrieval.k={settings.retrieval.k}: passages are drawn from the retrieved ones"
        raise refuse("objective.num_selected", objective.num_selected, allowed)
    if alignment.reference == "none" and objective.name != "dpo" and needs_reference(objective):
        why = "whose z compares with it" if objective.name == "kto" else f"and kl_weight={objective.kl_weight}"
        raise refuse(
            "alignment.reference", "none", f"must be copy or offload with objective.name={objective.name} {why}"
        )
    if alignment.updates_per_sample > 1 and not (objective.name == "grpo" and samples_answers(objective)):
        allowed = "must be 1, or objective.name must be grpo: without a ratio to clip, old samples are biased"
        raise refuse("alignment.updates_per_sample", alignment.updates_per_sample, allowed)
    if alignment.updates_per_sample > 1 and settings.engine.gradient_accumulation > 1:
        allowed = "must be 1 with engine.gradient_accumulation above 1: a batch would serve one step twice"
        raise refuse("alignment.updates_per_sample", alignment.updates_per_sample, allowed)


def _check_index(settings: Settings) -> None:
    """Refuse a kind of index that cannot be. The size of the corpus is checked later, when it is known."""
    index, k = settings.index, settings.retrieval.k
    kind = parse(index.factory)
    if index.device == "gpu":
        check_gpu_kind(kind)
    check_products(index.products, kind, index.device)
    parse_filter(settings.retrieval.where)
    if 0 < index.rescore_candidates < k:
        allowed = f"must be 0 (off) or at least retrieval.k={k}: proposals are scored again and cut to k"
        raise refuse("index.rescore_candidates", index.rescore_candidates, allowed)


def _check_refresh(settings: Settings) -> None:
    """Refuse a refresh policy that cannot decide, and a bound on staleness that no refresh can keep."""
    refresh = settings.refresh
    if refresh.policy != "every_steps":
        for setting, value in (
            ("drift_threshold", refresh.drift_threshold),
            ("check_every_steps", refresh.check_every_steps),
            ("probe_questions", refresh.probe_questions),
        ):
            if not value:
                raise refuse(f"refresh.{setting}", value, f"must be above 0 with refresh.policy={refresh.policy}")
    if refresh.policy == "both" and not refresh.every_steps:
        raise refuse("refresh.every_steps", 0, "must be above 0 with refresh.policy=both; on_drift needs none")
    bound, every = refresh.max_staleness_steps, refresh.every_steps if refresh.policy != "on_drift" else 0
    moves = settings.training.train in ("both", "retriever_only") and settings.objective.name not in CONTRASTIVE
    if not (bound and moves):
        return
    if every == 0 or bound < every:
        allowed = f"must be 0 (no bound) or at least refresh.every_steps={every}, which must not be 0 then"
        if refresh.policy == "on_drift":
            allowed = "must be 0 (no bound) with refresh.policy=on_drift, which promises no refresh"
        raise refuse("refresh.max_staleness_steps", bound, f"{allowed}; training would wait for ever")
    whole = every * refresh.whole_every
    if refresh.partial and (whole == 0 or bound < whole):
        allowed = f"must be 0 (no bound) or at least {whole} steps, from one whole refresh to the next"
        if whole == 0:
            allowed = "must be 0 (no bound) where refresh.partial is set and refresh.whole_every=0"
        raise refuse("refresh.max_staleness_steps", bound, f"{allowed}; training would wait for ever")


def _check_slow(index: IndexConfig) -> None:
    """Refuse a reaction to a slow shard that is not possible."""
    if index.on_slow != "wait" and not index.slow_after_s:
        raise refuse("index.slow_after_s", 0, f"must be above 0 with index.on_slow={index.on_slow}")
    if index.on_slow == "hedge" and index.replicas < 2:
        raise refuse("index.replicas", index.replicas, "must be 2 or more with index.on_slow=hedge")
    if index.slow_after_s >= index.search_timeout_s:
        allowed = f"must be below index.search_timeout_s={index.search_timeout_s:g}"
        raise refuse("index.slow_after_s", index.slow_after_s, allowed)


def _check_questions(settings: Settings) -> None:
    """Refuse wrong templates, labels, refusals and splits of questions."""
    questions = settings.questions
    fields = re.findall(r"\{(\w*)\}", questions.choice_template)
    wrong = [name for name in fields if name not in ("question", "options") or fields.count(name) > 1]
    if wrong or "question" not in fields:
        allowed = "must contain {question} once, {options} at most once, and no other field"
        raise refuse("questions.choice_template", repr(questions.choice_template), allowed)
    if len(questions.labels) < 2 or len(set(questions.labels)) < len(questions.labels) or "" in questions.labels:
        raise refuse("questions.labels", questions.labels, "must be two or more different labels")
    for setting, value in (("refusal_share", questions.refusal_share), ("unanswerable", questions.unanswerable)):
        if value and not questions.refusal.strip():
            raise refuse(f"questions.{setting}", value, "needs questions.refusal, the text of a refusal")
    if questions.unanswerable and questions.unanswerable in (questions.train, questions.evaluate):
        raise refuse("questions.unanswerable", questions.unanswerable, "must be another split than train and evaluate")
    learns = settings.objective.name not in CONTRASTIVE and settings.training.train != "none"
    if learns and not questions.train and not pretrains(settings.pretraining):
        raise refuse("questions.train", "", "must name a split, unless the stage has a section pretraining")


def _check_pretraining(settings: Settings) -> None:
    pretraining = settings.pretraining
    if not pretrains(pretraining):
        return
    mixture(pretraining)
    if contrasted(pretraining) and settings.training.train == "generator_only":
        task = next(iter(contrasted(pretraining)))
        allowed = "must be left out with training.train=generator_only: it trains the retriever alone"
        raise refuse(f"pretraining.{task}", getattr(pretraining, task), allowed)
    if settings.objective.name in (*PREFERENCE, "grpo"):
        allowed = "must be an objective of questions with one answer each, with a section pretraining"
        raise refuse("objective.name", settings.objective.name, allowed)
    if settings.objective.name in CONTRASTIVE:
        allowed = (
            "must be an objective that reads answers with a section pretraining; it cuts its own spans without one"
        )
        raise refuse("objective.name", settings.objective.name, allowed)
    if settings.retrieval.source == "gold":
        allowed = (
            "must be index or none with a section pretraining: the passage that an example was cut from is not read"
        )
        raise refuse("retrieval.source", "gold", allowed)
    if settings.questions.refusal_share:
        raise refuse(
            "questions.refusal_share", settings.questions.refusal_share, "must be 0 with a section pretraining"
        )
