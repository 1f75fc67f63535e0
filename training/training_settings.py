"""Configuration sections of the models, the objective and the training loop."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class FreshEncoderConfig:
    """Size of an encoder that starts from random weights (BERT shape)."""

    num_layers: int = 2
    hidden: int = 128
    num_heads: int = 4
    intermediate: int = 512
    dropout: float = 0.0


@dataclass
class TokenizerConfig:
    """Tokeniser of a fresh model: WordPiece trained once on the corpus and the training questions."""

    vocabulary: int = 3000
    lowercase: bool = True
    digits_whole: bool = False  # runs of digits are one word of the pre-tokeniser, never joined to letters


@dataclass
class LoraConfig:
    """Low-rank adapters of linear layers; the model's own weights stay as they are (Hu et al. 2021,
    arXiv:2106.09685). Whatever leaves the trainer (published weights, checkpoints) has them merged in."""

    rank: int = 0  # 0: off, all weights train
    alpha: float = 16.0  # the adapter's product is scaled by alpha / rank
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["auto"])  # ends of names; auto: every linear layer


@dataclass
class EncoderConfig:
    """The retriever's towers."""

    name: str = ""  # Hugging Face or sentence-transformers name or folder; empty: `fresh`
    fresh: FreshEncoderConfig = field(default_factory=FreshEncoderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # used when the model is fresh
    towers: str = "shared"  # shared | separate; a run that starts from two towers, query_only's say, keeps both
    pooling: str = "auto"  # auto (read from the checkpoint, mean when fresh) | mean | cls | last
    normalize: str = "auto"  # auto (read from the checkpoint, true when fresh) | true | false
    temperature: float = 0.05  # scores are inner products divided by this
    max_question_tokens: int = 32
    max_passage_tokens: int = 64
    max_title_tokens: int = 24
    length_groups: int = 4  # passages are sorted by length into so many trimmed groups
    attention: str = "auto"  # auto (eager on CPU, sdpa on GPU) | eager | sdpa | flash_attention_2
    gradient_checkpointing: bool = False
    # Passages whose activations the passage encoder keeps at a time; the rest is computed again in the backward pass
    # (gradient caching), so that memory does not grow with k. 0: all are kept.
    gradient_cache_passages: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    trust_remote_code: bool = False

    def num_towers(self, train: str) -> int:
        """2 where questions and passages have weights of their own: set so, or `training.train` is query_only."""
        return 2 if self.towers == "separate" or train == "query_only" else 1


@dataclass
class FreshGeneratorConfig:
    """Size of a generator that starts from random weights."""

    num_encoder_layers: int = 2
    num_decoder_layers: int = 1
    hidden: int = 128
    num_heads: int = 4
    intermediate: int = 512
    dropout: float = 0.0
    family: str = "llama"  # causal: llama | gpt2 | qwen2 | mamba | mamba2 | jamba (attention every other layer)


FRESH_CONTEXT = 8192  # tokens that a fresh causal model takes; rotary positions cost nothing


@dataclass
class GeneratorConfig:
    """The language model that reads passages and writes answers."""

    kind: str = "copy"  # copy (small, copy head) | fusion (any encoder-decoder) | causal (any causal LM)
    # Hugging Face name or folder; empty: `fresh`. copy: of an encoder (BERT and its like), which reads the passages and
    # sets the width; the decoder is fresh, `fresh.dropout` is that of both.
    name: str = ""
    fresh: FreshGeneratorConfig = field(default_factory=FreshGeneratorConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # used when fresh and the encoder is not
    template: str = "{passages}Question: {question}\nAnswer:"  # causal: segments, tokenised once
    passage_template: str = "{title}\n{text}\n\n"  # causal: one passage inside {passages}
    chat_template: str = "auto"  # causal: auto (the tokeniser's, around `template`, where it has one) | never
    system_prompt: str = ""  # before everything else; the system message of a `messages` row takes its place
    max_context_tokens: int = 256  # causal: of a system prompt and earlier turns; other kinds: within the question's
    max_question_tokens: int = 32
    max_passage_tokens: int = 64
    max_answer_tokens: int = 16
    length_groups: int = 4
    attention: str = "auto"
    gradient_checkpointing: bool = False
    loss_chunk_tokens: int = 512  # logits of so many tokens at a time where all are many; 0: always all at once
    lora: LoraConfig = field(default_factory=LoraConfig)
    trust_remote_code: bool = False


@dataclass
class ObjectiveConfig:
    """What is minimised; see `training/objectives/`."""

    # rag_sequence, rag_token, realm, emdr2, pdist, loop, adist, fused | inverse_cloze, independent_cropping |
    # dpo, kto | stochastic_rag, reinforce, grpo
    name: str = "rag_sequence"
    temperature: float = 1.0  # of p(z|q), on top of the encoder's own
    target_temperature: float = 1.0  # pdist, loop, adist
    confidence: bool = False  # pdist, loop, adist: a question counts by how sure the generator is of its best passage
    weight: float = 1.0  # of the retriever loss beside the generator loss (emdr2, pdist, loop, adist)
    level: str = "sequence"  # emdr2: sequence | token
    normalization: str = "length"  # pdist: length | none
    reduction: str = "batch"  # pdist, loop, adist: batch | elements
    null_score: str = (
        "learned"  # realm: score of the empty passage, a parameter of the retriever, or 0: learned | fixed
    )
    score_bias: bool = True  # fused: add log p(z|q) to the reader's attention on passage z, with gradient
    keep_probability: float = 0.1  # inverse cloze: chance that the sentence stays in its passage
    title_probability: float = 0.3  # inverse cloze: chance that the query is the title instead of a span
    drop_probability: float = 0.1  # inverse cloze: chance that a query token is dropped
    min_span: int = 5  # tokens of a query span
    max_span: int = 14
    scale: float = 1.0  # multiplies the loss
    beta: float = 0.1  # dpo, kto: how strongly a preference may move the system from its reference
    # dpo: of the chosen answer's negative log-likelihood per token, beside the preference; a preference alone may make
    # both answers less likely, and says little about what to retrieve
    chosen_weight: float = 0.0
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0  # kto
    length_normalized: bool = False  # dpo, kto: log-likelihoods per answer token
    num_selected: int = 2  # stochastic_rag: passages drawn of the retrieved ones
    relaxation: float = 1.0  # stochastic_rag: temperature of the soft selection that the gradient flows through
    group_size: int = 4  # reinforce, grpo: samples of a question
    # reinforce, grpo: rewards against their group's mean, in units of its deviation (normalized) or of the reward
    # (centered): what differs little then counts little
    advantage: str = "normalized"
    # reinforce, grpo: exact_match, f1, grounded (the answer stands in its passage), module:function, file.py:function
    # (of question, answer, gold answers, passages read); likelihood (reinforce only): of the gold answer
    reward: str = "exact_match"
    sampling_temperature: float = 1.0  # reinforce, grpo: of the answers' tokens
    clip: float = 0.2  # grpo
    kl_weight: float = 0.0  # reinforce, grpo: of the divergence from the reference


@dataclass
class AlignmentConfig:
    """The reference and the samples of preference and sampling objectives."""

    # What the system is compared with: its weights at the start of the stage, frozen. copy (beside the trained ones),
    # offload (kept in the host's memory, moved to the device for each batch) or none (its log-likelihoods are 0). Where
    # nothing but fresh adapters trains, copy and offload mean the adapters switched off, without a copy.
    reference: str = "copy"
    updates_per_sample: int = 1  # grpo: optimiser steps on one batch of samples


@dataclass
class PretrainingConfig:
    """Training examples cut from the corpus itself (`training/feeding/tasks.py`). The first six are the mixture's
    weights; none set: the stage trains on questions."""

    span_corruption: float | None = None  # spans of a passage are masked; the answer is what was there
    salient_span: float | None = None  # a name, a date or a number is masked
    prefix_lm: float | None = None  # a passage is continued
    title_to_section: float | None = None  # the first sentences under a title
    inverse_cloze: float | None = None  # the retriever alone: a span against its own passage among others
    independent_cropping: float | None = None  # the retriever alone: two spans of one passage
    contrast_passages: int = 64  # passages that a micro-batch of the two above contrasts; spans as in `objective`
    recognizer: str = "regex"  # of salient spans: regex, or module:function (text -> [(start, stop), ...])
    context_words: int = 24  # of a passage in a question at most; fewer where its tokens would be cut
    mask_share: float = 0.15  # of the words, span corruption
    mean_span_words: float = 3.0  # span corruption
    duplicate_threshold: float = 0.7  # token-trigram Jaccard from which passages are near-duplicates; above 1: none are
    margin: int = 8  # hits searched beyond retrieval.k, in place of an example's own passage and its near-duplicates
    held_out: float = 0.02  # share of the passages (with near-duplicates) that no example is cut from but held-out ones
    held_out_examples: int = 256  # that are measured; 0: none


@dataclass
class RetrievalConfig:
    """Where the passages of a question come from while training and evaluating."""

    # index | fixed (RAG 1.0: the index of a frozen retriever) | gold (the labelled passage, filled up with retrieved
    # ones) | long (no retrieval: as much of the corpus as fits in the prompt) | none (closed book)
    source: str = "index"
    k: int = 4
    # Only passages whose metadata meets these conditions are found, by field: a value, a list of values, or bounds like
    # {">=": 2019, "<": 2024}; indexing/corpus/stores/filters.py
    where: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: int = 0  # long: of a prompt and its answer; 0: what the generator takes (causal only)
    prefetch_depth: int = 1  # batches searched ahead while one trains
    # Candidates are searched so many times k, scored again by the encoders as they are now, and the best k read
    # (training/retrieving/rescore.py); 0, 1: off. In training only: an evaluation measures the index as it answers, so
    # that runs with and without are compared by one measure, and a stage's last evaluation has a fresh index anyway.
    # With hybrid the candidates of both indexes are scored again and fused anew; a re-ranker chooses among the best.
    rescore: int = 0
    # Words beside vectors (BM25, section `lexical`). none | rrf (reciprocal ranks choose the passages; p(z|q) is the
    # dense one) | learned (p(z|q) is of inner product + weight * lexical score, the weight trains with the retriever)
    hybrid: str = "none"
    candidates: int = 100  # hybrid: hits of each of the two indexes that are fused
    rrf_constant: float = 60.0  # rrf: a passage scores 1 / (constant + place) in each ranking
    lexical_weight: float = 0.2  # learned: where the weight starts, in units of an inner product; lexical scores are
    # divided by the corpus's best one for the same question


@dataclass
class RerankerConfig:
    """A cross-encoder that reads question and passage together and is part of p(z|q)."""

    mode: str = "off"  # off | add (to the retriever's score) | replace (it alone; the retriever then does not train)
    name: str = ""  # Hugging Face cross-encoder, one label; empty: `fresh`, with the retriever's tokeniser
    fresh: FreshEncoderConfig = field(default_factory=FreshEncoderConfig)
    candidates: int = 20  # hits that are re-ranked, without gradient, before the best retrieval.k are read
    max_question_tokens: int = 32  # with `name`: of its own tokeniser
    max_passage_tokens: int = 128
    length_groups: int = 4
    attention: str = "auto"  # auto (eager on CPU, sdpa on GPU) | eager | sdpa | flash_attention_2
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class TrainingConfig:
    """One stage of training."""

    train: str = "both"  # both | query_only | retriever_only | generator_only | none
    steps: int = 250  # optimiser steps
    batch_size: int = 16  # questions per micro-batch and trainer
    lr_retriever: float = 1e-3
    lr_generator: float = 2e-3
    warmup_steps: int = 20
    # Steps in which the generator learns alone, before the retriever's warm-up begins: for objectives that hand it the
    # reader's verdict (pdist, loop, adist, reinforce), which is noise until the reader can read; nothing is refreshed
    # meanwhile
    retriever_delay_steps: int = 0
    schedule: str = "linear"  # linear (to zero) | constant
    log_every: int = 1
    stop_after_nonfinite: int = 5  # updates skipped in a row before the run stops
    # Retrieval got worse than at the start (training/measuring/collapse.py): warn | stop | ignore
    on_collapse: str = "warn"


@dataclass
class EngineConfig:
    """DeepSpeed."""

    zero_stage: int = 0
    # fp32 | bf16 (16-bit weights, fp32 masters) | bf16_autocast (fp32 weights, 16-bit compute) | auto (bf16_autocast
    # where the trainers' GPU has products of bf16, or their CPU has and the matrices are wide; else fp32)
    precision: str = "fp32"
    gradient_accumulation: int = 1
    clip_norm: float = 1.0  # of retriever and of generator, separately; 0: none
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    offload_optimizer: bool = False
    timeout_s: float = 600.0  # of a collective


@dataclass
class CheckpointConfig:
    """What is kept for a resume."""

    every_steps: int = 100
    keep: int = 2
    index: bool = True  # save the index generation in use with the checkpoint


@dataclass
class DecodingConfig:
    """How an answer is written."""

    mode: str = "marginal"  # marginal (per passage, answers summed with p(z|q)) | fused | top1
    num_beams: int = 1
    max_tokens: int = 12


@dataclass
class NeedleConfig:
    """A sweep over prompts with the labelled passage at a known place among random others; off while it is empty."""

    lengths: list[int] = field(default_factory=list)  # tokens of a prompt and its answer
    depths: list[float] = field(default_factory=list)  # 0: the labelled passage comes first, 1: last
    num_questions: int = 50  # asked in each cell, the same ones; 0: all


@dataclass
class EvaluationConfig:
    """What is measured, and when."""

    every_steps: int = 0  # 0: only at the end
    max_questions: int = 0  # of an evaluation during training; 0: all
    batch_size: int = 32
    k: int = 100  # depth of the ranking metrics
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    # more modes at the end: marginal | fused | top1 | closed_book | gold | long
    also: list[str] = field(default_factory=list)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    examples: int = 5  # decoded examples that the report prints


@dataclass
class MonitorConfig:
    """Console, metrics.jsonl and W&B."""

    console: bool = True
    wandb: str = "auto"  # auto (online with a key, else offline) | online | offline | off
    project: str = "tandem"
    entity: str = ""
    init_timeout_s: float = 20.0
