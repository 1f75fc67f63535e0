"""What a single setting may be: words, ranges, dates; and the nearest word to a misspelt one."""

import math
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from cluster.config.refusal import refuse
from cluster.config.settings import Settings
from indexing.dense.kinds import PRODUCTS
from training.objectives.check import PREFERENCE, SAMPLING
from training.refreshing.policy import POLICIES

CONTRASTIVE = ("inverse_cloze", "independent_cropping")  # objectives without a generator
DECODING = ("marginal", "fused", "top1")


CHOICES: dict[str, tuple[str, ...]] = {
    "corpus.format": ("auto", "beir", "jsonl", "parquet"),
    "corpus.on_bad": ("error", "skip"),
    "questions.on_bad": ("error", "skip"),
    "questions.target": ("first", "sampled", "in_passage"),
    "encoder.towers": ("shared", "separate"),
    "encoder.pooling": ("auto", "mean", "cls", "last"),
    "encoder.normalize": ("auto", "true", "false"),
    "encoder.attention": ("auto", "eager", "sdpa", "flash_attention_2"),
    "generator.kind": ("copy", "fusion", "causal"),
    "generator.fresh.family": ("llama", "gpt2", "qwen2", "mamba", "mamba2", "jamba"),
    "generator.chat_template": ("auto", "never"),
    "generator.attention": ("auto", "eager", "sdpa", "flash_attention_2"),
    "preferences.format": ("auto", "paired", "unpaired"),
    "preferences.on_bad": ("error", "skip"),
    "objective.name": (
        *("rag_sequence", "rag_token", "realm", "emdr2", "pdist", "loop", "adist", "fused"),
        *(*CONTRASTIVE, *PREFERENCE, *SAMPLING),
    ),
    "alignment.reference": ("copy", "offload", "none"),
    "objective.level": ("sequence", "token"),
    "objective.normalization": ("length", "none"),
    "objective.advantage": ("normalized", "centered"),
    "objective.reduction": ("batch", "elements"),
    "objective.null_score": ("learned", "fixed"),
    "retrieval.source": ("index", "fixed", "gold", "long", "none"),
    "retrieval.hybrid": ("none", "rrf", "learned"),
    "reranker.mode": ("off", "add", "replace"),
    "reranker.attention": ("auto", "eager", "sdpa", "flash_attention_2"),
    "index.device": ("cpu", "gpu"),
    "index.products": PRODUCTS,
    "index.on_slow": ("wait", "hedge", "refuse"),
    "refresh.precision": ("float32", "bfloat16"),
    "refresh.policy": POLICIES,
    "training.train": ("both", "query_only", "retriever_only", "generator_only", "none"),
    "training.schedule": ("linear", "constant"),
    "training.on_collapse": ("warn", "stop", "ignore"),
    "engine.precision": ("fp32", "bf16", "bf16_autocast", "auto"),
    "evaluation.decoding.mode": DECODING,
    "monitor.wandb": ("auto", "online", "offline", "off"),
    "cluster.check_fit": ("refuse", "warn", "off"),
    "plan.gpu": ("auto", "h100", "h200", "a100-80g", "a100-40g", "l40s", "a10g", "t4", "cpu"),
}
ALSO = (*DECODING, "closed_book", "gold", "long")

# Numbers are never negative; these are above zero, or a share between 0 and 1.
POSITIVE = {
    *("corpus.max_characters", "corpus.world.num_people", "corpus.world.num_values"),
    *("encoder.temperature", "encoder.max_question_tokens", "encoder.max_passage_tokens", "encoder.length_groups"),
    *("encoder.fresh.num_layers", "encoder.fresh.hidden", "encoder.fresh.num_heads", "encoder.fresh.intermediate"),
    *("encoder.tokenizer.vocabulary", "generator.tokenizer.vocabulary", "generator.length_groups"),
    *("generator.fresh.num_encoder_layers", "generator.fresh.num_decoder_layers", "generator.fresh.hidden"),
    *("generator.fresh.num_heads", "generator.fresh.intermediate", "encoder.lora.alpha", "generator.lora.alpha"),
    *("generator.max_question_tokens", "generator.max_passage_tokens", "generator.max_answer_tokens"),
    *("objective.temperature", "objective.target_temperature", "objective.scale", "objective.min_span"),
    *("generator.max_context_tokens", "pretraining.context_words", "pretraining.mask_share"),
    *("pretraining.mean_span_words", "pretraining.duplicate_threshold", "pretraining.contrast_passages"),
    *("retrieval.candidates", "retrieval.lexical_weight", "reranker.candidates", "reranker.length_groups"),
    *("reranker.max_question_tokens", "reranker.max_passage_tokens", "reranker.fresh.num_layers"),
    *("reranker.fresh.hidden", "reranker.fresh.num_heads", "reranker.fresh.intermediate"),
    *("retrieval.k", "index.num_shards", "index.nprobe", "index.training_sample", "index.keep_generations"),
    *("index.ef_search", "index.ef_construction"),
    *("index.search_timeout_s", "refresh.num_workers", "refresh.chunk_passages", "refresh.batch_tokens"),
    "index.replicas",
    *("refresh.threads", "refresh.chunk_timeout_s", "training.batch_size", "training.log_every"),
    *("training.stop_after_nonfinite", "engine.gradient_accumulation", "engine.epsilon", "engine.timeout_s"),
    *("checkpoint.keep", "evaluation.batch_size", "evaluation.k", "evaluation.decoding.num_beams"),
    *("evaluation.decoding.max_tokens", "monitor.init_timeout_s", "cluster.num_trainers"),
    *("cluster.threads_per_trainer", "cluster.start_timeout_s", "plan.gpus_per_node", "plan.network_gbit_s"),
    *("objective.beta", "objective.num_selected", "objective.relaxation", "objective.group_size", "objective.clip"),
    *("objective.sampling_temperature", "alignment.updates_per_sample"),
}
SHARES = {
    *("corpus.world.lookalike_probability", "corpus.world.swap_fraction"),
    *("reranker.fresh.dropout", "lexical.b"),
    *("encoder.fresh.dropout", "generator.fresh.dropout", "encoder.lora.dropout", "generator.lora.dropout"),
    *("objective.keep_probability", "objective.title_probability", "objective.drop_probability"),
    *("engine.beta1", "engine.beta2"),
    *("questions.refusal_share", "pretraining.held_out", "cluster.memory_margin"),
    *("refresh.drift_threshold", "refresh.max_share", "refresh.partial"),
}
GPUS = {"cluster.trainer_gpus", "cluster.refresh_gpus", "cluster.shard_gpus"}

_DATE = re.compile(r"(end|\d{4}-\d{2}-\d{2})?")


def values_of(section: object, prefix: str = "") -> dict[str, object]:
    """Dotted name -> value of every setting below `section`, a dataclass."""
    values: dict[str, object] = {}
    for entry in fields(section):  # pyright: ignore[reportArgumentType]
        value = vars(section)[entry.name]
        if is_dataclass(value):
            values |= values_of(value, f"{prefix}{entry.name}.")
        else:
            values[f"{prefix}{entry.name}"] = value
    return values


def suggestion(word: str, known: tuple[str, ...] | list[str], cutoff: float = 0.6, prefix: str = "") -> str:
    """' Did you mean ...?' with the nearest of `known`, at most two, each after `prefix`; empty if none is near."""
    near = get_close_matches(word, known, n=2, cutoff=cutoff)
    return f" Did you mean {' or '.join(prefix + name for name in near)}?" if near else ""


def check_date(setting: str, value: str) -> None:
    """Refuse what is neither empty, "end" nor YYYY-MM-DD."""
    if not _DATE.fullmatch(value):
        raise refuse(setting, value, 'must be empty, "end" or a date YYYY-MM-DD')


def check_values(settings: Settings) -> None:
    """Check every setting by itself. Raises ValueError."""
    for setting, value in values_of(settings).items():
        if isinstance(value, str):
            _check_choice(setting, value, CHOICES.get(setting))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(setting, value)
    for mode in settings.evaluation.also:
        _check_choice("evaluation.also", mode, ALSO)
    check_date("corpus.as_of", settings.corpus.as_of)
    check_date("questions.as_of", settings.questions.as_of)


def _check_choice(setting: str, value: str, allowed: tuple[str, ...] | None) -> None:
    if allowed is not None and value not in allowed:
        raise refuse(setting, value, f"must be one of {', '.join(allowed)}.{suggestion(value, allowed)}")


def _check_number(setting: str, value: float) -> None:
    if not math.isfinite(value):
        raise refuse(setting, value, "must be a finite number")
    if setting in GPUS:
        if value != -1 and (value < 0 or (value > 1 and value != int(value))):
            raise refuse(setting, value, "must be -1 (automatic), a share between 0 and 1, or a whole number of GPUs")
    elif setting in POSITIVE:
        if value <= 0:
            raise refuse(setting, value, "must be at least 1" if isinstance(value, int) else "must be above 0")
    elif setting in SHARES:
        if not 0 <= value <= 1:
            raise refuse(setting, value, "must be between 0 and 1")
    elif value < 0:
        raise refuse(setting, value, "must not be negative")
