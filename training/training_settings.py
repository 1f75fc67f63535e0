"""Settings of the models, of the objective and of the training loop."""

from dataclasses import dataclass
from typing import Any

from indexing.declare import section, setting
from training.generator_kinds import GENERATOR_KINDS, GeneratorKind, kinds_in_words

GENERATIVE = ("rag_sequence", "rag_token", "realm", "emdr2", "pdist", "loop", "adist", "fused")
CONTRASTIVE = ("inverse_cloze", "independent_cropping")  # objectives without a generator
PREFERENCE = ("dpo", "kto")
SAMPLING = ("stochastic_rag", "reinforce", "grpo")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2")
DTYPES = ("float32", "bfloat16")  # of published weights
DECODINGS = ("marginal", "fused", "top1")
TRAINS_RETRIEVER = ("both", "query_only", "retriever_only")  # values of training.train
FRESH_CONTEXT = 8192  # tokens that a fresh causal model takes; rotary positions cost nothing

# Tables of settings, laid out by hand.
# fmt: off


@dataclass(kw_only=True)
class FreshEncoderConfig:
    """Size of an encoder that starts from random weights (BERT shape)."""

    num_layers: int = setting(2, "Number of layers.", unit="layers", least=1)
    hidden: int = setting(128, "Numbers in a hidden state, and in a vector; a multiple of num_heads.", unit="numbers",
        least=1)
    num_heads: int = setting(4, "Number of attention heads of a layer.", unit="heads", least=1)
    intermediate: int = setting(512, "Numbers between the two halves of a feed-forward block.", unit="numbers", least=1)
    dropout: float = setting(0.0, "Share of the activations and attention weights that training drops.", unit="share",
        least=0, most=1)


@dataclass
class TokenizerConfig:
    """Tokeniser of a fresh model: WordPiece trained once on the corpus and the training questions."""

    vocabulary: int = setting(3000, "Number of word pieces; at least the special tokens and the alphabet.",
        unit="tokens", least=1)
    lowercase: bool = setting(True, "Reads every text as lowercase.")
    digits_whole: bool = setting(False, "Keeps a run of digits as one word of the pre-tokeniser, never joined to "
        "letters.")


@dataclass
class LoraConfig:
    """Low-rank adapters of linear layers; the weights of the model stay as they are (Hu et al. 2021, arXiv:2106.09685).
    Published weights and checkpoints have them merged in."""

    rank: int = setting(0, "Number of columns of an adapter's two matrices. 0: no adapters, all weights train.",
        unit="columns")
    alpha: float = setting(16.0, "Factor of an adapter's product, which is scaled by alpha / rank.", unit="factor",
        above=0)
    dropout: float = setting(0.0, "Share of an adapter's inputs that training drops.", unit="share", least=0, most=1)
    target_modules: list[str] = setting(["auto"], "Layers that get adapters, by the ends of their names; auto: every "
        "linear layer.")


@dataclass(kw_only=True)
class EncoderConfig:
    """The retriever: the encoders of questions and passages."""

    name: str = setting("", "Hugging Face or sentence-transformers name or folder. Empty: a fresh encoder of size "
        "`encoder.fresh`.")
    fresh: FreshEncoderConfig = section(FreshEncoderConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    towers: str = setting("shared", "Weights of the question and the passage encoder: the same or two sets. A run that "
        "starts from two towers keeps both.", choices=("shared", "separate"))
    pooling: str = setting("auto", "Pooling of token states into a vector; auto reads it from the checkpoint (mean "
        "when fresh).", choices=("auto", "mean", "cls", "last"))
    normalize: str = setting("auto", "Scales vectors to length 1; auto reads it from the checkpoint (true when fresh).",
        choices=("auto", "true", "false"))
    temperature: float = setting(0.05, "Divisor of the inner products that are scores.", unit="divisor", above=0)
    max_question_tokens: int = setting(32, "Number of tokens after which a question is cut for the encoder.",
        unit="tokens", least=1)
    max_passage_tokens: int = setting(64, "Number of tokens after which a passage, title included, is cut for the "
        "encoder.", unit="tokens", least=1)
    max_title_tokens: int = setting(24, "Number of tokens after which a title is cut, with a fresh model.",
        unit="tokens")
    length_groups: int = setting(4, "Number of groups that a batch is sorted into by length, each trimmed to its "
        "longest text.", unit="groups", least=1)
    attention: str = setting("auto", "Implementation of attention; auto is eager on CPU and sdpa on GPU.",
        choices=ATTENTIONS)
    gradient_checkpointing: bool = setting(False, "Recomputes activations in the backward pass: less memory, more "
        "time.")
    gradient_cache_passages: int = setting(0, "Number of passages whose activations the passage encoder keeps at a "
        "time; the rest is computed again in the backward pass (gradient caching), so that memory does not grow with "
        "k. 0: all are kept.", unit="passages")
    lora: LoraConfig = section(LoraConfig)
    trust_remote_code: bool = setting(False, "Runs the Python code that a model repository brings along.")

    def num_towers(self, train: str) -> int:
        """Return 2 if questions and passages have separate weights: by `towers`, or if `train` is query_only."""
        return 2 if self.towers == "separate" or train == "query_only" else 1


@dataclass(kw_only=True)
class FreshGeneratorConfig:
    """Size of a generator that starts from random weights."""

    num_encoder_layers: int = setting(2, "Number of encoder layers (copy, fusion).", unit="layers", least=1)
    num_decoder_layers: int = setting(1, "Number of decoder layers; all layers of a causal model.", unit="layers",
        least=1)
    hidden: int = setting(128, "Numbers in a hidden state; a multiple of num_heads (causal: of twice that).",
        unit="numbers", least=1)
    num_heads: int = setting(4, "Number of attention heads of a layer.", unit="heads", least=1)
    intermediate: int = setting(512, "Numbers between the two halves of a feed-forward block.", unit="numbers", least=1)
    dropout: float = setting(0.0, "Share of the activations that training drops.", unit="share", least=0, most=1)
    family: str = setting("llama", "Architecture of a fresh causal model; jamba attends in every other layer.",
        choices=("llama", "gpt2", "qwen2", "mamba", "mamba2", "jamba"))


@dataclass(kw_only=True)
class GeneratorConfig:
    """The language model that reads passages and writes answers."""

    kind: str = setting("copy", f"Kind of generator: {kinds_in_words()}.", choices=tuple(GENERATOR_KINDS))
    name: str = setting("", "Hugging Face name or folder. With kind copy: of an encoder like BERT, which reads the "
        "passages and sets the width, under a fresh decoder. Empty: a fresh generator of size `generator.fresh`.")
    fresh: FreshGeneratorConfig = section(FreshGeneratorConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    template: str = setting("{passages}Question: {question}\nAnswer:", "Prompt of a causal generator; its segments are "
        "tokenised once. Must contain {passages} and {question}.")
    passage_template: str = setting("{title}\n{text}\n\n", "Text of one passage inside {passages} of a causal "
        "generator's prompt. Must contain {text}.")
    chat_template: str = setting("auto", "Use of the tokeniser's chat template around `template` by a causal "
        "generator: auto, where it has one, or never.", choices=("auto", "never"))
    system_prompt: str = setting("", "Text before everything else; the system message of a `messages` row takes its "
        "place.")
    max_context_tokens: int = setting(256, "Number of tokens for system prompt and earlier turns of a causal "
        "generator; in other kinds these count among the question's.", unit="tokens", least=1)
    max_question_tokens: int = setting(32, "Number of tokens after which a question is cut for the generator.",
        unit="tokens", least=1)
    max_passage_tokens: int = setting(64, "Number of tokens after which a passage is cut for the generator.",
        unit="tokens", least=1)
    max_answer_tokens: int = setting(16, "Number of tokens after which an answer is cut in training.", unit="tokens",
        least=1)
    length_groups: int = setting(4, "Number of groups that a batch is sorted into by length, each trimmed to its "
        "longest text.", unit="groups", least=1)
    attention: str = setting("auto", "Implementation of attention; auto is eager on CPU and sdpa on GPU.",
        choices=ATTENTIONS)
    gradient_checkpointing: bool = setting(False, "Recomputes activations in the backward pass: less memory, more "
        "time.")
    loss_chunk_tokens: int = setting(512, "Number of tokens whose logits are computed at a time where there are many. "
        "0: always all at once.", unit="tokens")
    lora: LoraConfig = section(LoraConfig)
    trust_remote_code: bool = setting(False, "Runs the Python code that a model repository brings along.")

    @property
    def traits(self) -> GeneratorKind:
        """Return the facts about `kind`."""
        return GENERATOR_KINDS[self.kind]


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The loss that is minimised (`training/objectives/`)."""

    name: str = setting("rag_sequence", "Objective: of retriever and generator (rag_sequence to fused), of the "
        "retriever alone (inverse_cloze, independent_cropping), of preferences (dpo, kto), or of samples "
        "(stochastic_rag, reinforce, grpo).", choices=(*GENERATIVE, *CONTRASTIVE, *PREFERENCE, *SAMPLING))
    temperature: float = setting(1.0, "Divisor of the scores in p(z|q), on top of encoder.temperature.", unit="divisor",
        above=0)
    target_temperature: float = setting(1.0, "Divisor of the generator's scores in the target distribution (pdist, "
        "loop, adist).", unit="divisor", above=0)
    confidence: bool = setting(False, "Weights a question by how sure the generator is of its best passage (pdist, "
        "loop, adist).")
    weight: float = setting(1.0, "Factor of the retriever's loss beside the generator's (emdr2, pdist, loop, adist).",
        unit="factor")
    level: str = setting("sequence", "Level at which emdr2 marginalises over passages.", choices=("sequence", "token"))
    normalization: str = setting("length", "Divides an answer's log-likelihood by its length in the target of pdist, "
        "or not.", choices=("length", "none"))
    reduction: str = setting("batch", "Mean of the divergence (pdist, loop, adist): over questions (batch), or divided "
        "by the number of a question's passages as well (elements).", choices=("batch", "elements"))
    null_score: str = setting("learned", "Score of realm's empty passage: a parameter of the retriever, or 0 (fixed).",
        choices=("learned", "fixed"))
    score_bias: bool = setting(True, "Adds log p(z|q) to the generator's attention on passage z, with gradient "
        "(fused).")
    keep_probability: float = setting(0.1, "Chance that the query's span also stays in its passage (inverse_cloze).",
        unit="chance", least=0, most=1)
    title_probability: float = setting(0.3, "Chance that the query is the title instead of a span (inverse_cloze).",
        unit="chance", least=0, most=1)
    drop_probability: float = setting(0.1, "Chance that a token of the query is dropped (inverse_cloze, "
        "independent_cropping).", unit="chance", least=0, below=1)
    min_span: int = setting(5, "Number of tokens of the shortest query span (inverse_cloze, independent_cropping).",
        unit="tokens", least=1)
    max_span: int = setting(14, "Number of tokens of the longest query span (inverse_cloze, independent_cropping).",
        unit="tokens")
    scale: float = setting(1.0, "Factor of the whole loss.", unit="factor", above=0)
    beta: float = setting(0.1, "Factor of the log-ratios to the reference: the smaller, the further a preference may "
        "move the system from it (dpo, kto).", unit="factor", above=0)
    chosen_weight: float = setting(0.0, "Factor of the chosen answer's negative log-likelihood per token beside the "
        "preference (dpo), which alone may make both answers less likely and says little about retrieval.",
        unit="factor")
    desirable_weight: float = setting(1.0, "Factor of the loss of desirable answers (kto).", unit="factor")
    undesirable_weight: float = setting(1.0, "Factor of the loss of undesirable answers (kto).", unit="factor")
    length_normalized: bool = setting(False, "Divides log-likelihoods by the number of answer tokens (dpo, kto).")
    num_selected: int = setting(2, "Number of passages that are drawn of the retrieved ones (stochastic_rag).",
        unit="passages", least=1)
    relaxation: float = setting(1.0, "Temperature of the soft selection that the gradient flows through "
        "(stochastic_rag).", unit="temperature", above=0)
    group_size: int = setting(4, "Number of samples of a question (reinforce, grpo); 2 or more there.", unit="samples",
        least=1)
    advantage: str = setting("normalized", "Unit of rewards against their group's mean (reinforce, grpo): its "
        "deviation, or the reward's unit (centered), in which small differences count little.",
        choices=("normalized", "centered"))
    reward: str = setting("exact_match", "Reward of a sampled answer (reinforce, grpo): exact_match, f1, grounded (the "
        "answer stands in its passage), module:function or file.py:function (of question, answer, gold answers and "
        "passages read), or likelihood (reinforce only: of the gold answer).")
    function: str = setting("", "Loss of your own instead of the named objective's, whose name decides what is "
        "computed for it: module:function or file.py:function. Empty: none.")
    sampling_temperature: float = setting(1.0, "Temperature at which the tokens of answers are sampled (reinforce, "
        "grpo).", unit="temperature", above=0)
    clip: float = setting(0.2, "Distance from 1 at which the probability ratio is clipped (grpo).", unit="ratio",
        above=0)
    kl_weight: float = setting(0.0, "Factor of the divergence from the reference (reinforce, grpo).", unit="factor")


@dataclass(kw_only=True)
class RetrievalConfig:
    """The choice of the passages that belong to a question, in training and in evaluation."""

    source: str = setting("index", "Source of the passages: the index, fixed (RAG 1.0: the index of a frozen "
        "retriever), gold (the labelled passage, filled up with retrieved ones), long (no retrieval: as much of the "
        "corpus as fits in the prompt) or none (closed book).", choices=("index", "fixed", "gold", "long", "none"))
    k: int = setting(4, "Number of passages that are read for a question.", unit="passages", least=1)
    where: dict[str, Any] = setting({}, "Conditions on a passage's metadata, by field: a value, a list of values, or "
        "bounds like {\">=\": 2019, \"<\": 2024}. Only passages that meet all of them are found.")
    max_context_tokens: int = setting(0, "Number of tokens of a long prompt and its answer (source long). 0: as many "
        "as the generator takes (causal only).", unit="tokens")
    prefetch_depth: int = setting(1, "Number of batches that are searched ahead while one trains.", unit="batches")
    rescore: int = setting(0, "Factor of k: so many times k candidates are searched, scored again by the encoders as "
        "they are now, and the best k read; in training only, and before a re-ranker chooses. 0 and 1: off.",
        unit="factor")
    hybrid: str = setting("none", "Fusion with lexical search (BM25): none, rrf (reciprocal ranks choose the passages; "
        "p(z|q) stays the dense one) or learned (p(z|q) is of inner product + weight * lexical score; the weight "
        "trains with the retriever).", choices=("none", "rrf", "learned"))
    candidates: int = setting(100, "Number of hits of each of the two indexes that are fused (hybrid).",
        unit="passages", least=1)
    rrf_constant: float = setting(60.0, "Ranks that rrf adds to a passage's place: it scores 1 / (constant + place) in "
        "each ranking.", unit="ranks")
    lexical_weight: float = setting(0.2, "Weight of lexical scores at the start of learned fusion, in units of an "
        "inner product; lexical scores are divided by the corpus's best one for the same question.", unit="weight",
        above=0)


@dataclass(kw_only=True)
class RerankerConfig:
    """A cross-encoder that reads question and passage together and is part of p(z|q)."""

    mode: str = setting("off", "Use of the re-ranker: off, its score added to the retriever's, or in place of it "
        "(replace; the retriever then does not train).", choices=("off", "add", "replace"))
    name: str = setting("", "Hugging Face cross-encoder with one label, name or folder. Empty: a fresh one of size "
        "`reranker.fresh`, with the retriever's tokeniser.")
    fresh: FreshEncoderConfig = section(FreshEncoderConfig)
    candidates: int = setting(20, "Number of hits that are re-ranked, without gradient, before the best retrieval.k "
        "are read.", unit="passages", least=1)
    max_question_tokens: int = setting(32, "Number of tokens after which a question is cut, by the tokeniser of "
        "reranker.name.", unit="tokens", least=1)
    max_passage_tokens: int = setting(128, "Number of tokens after which a passage is cut for the re-ranker.",
        unit="tokens", least=1)
    length_groups: int = setting(4, "Number of groups that a batch is sorted into by length, each trimmed to its "
        "longest text.", unit="groups", least=1)
    attention: str = setting("auto", "Implementation of attention; auto is eager on CPU and sdpa on GPU.",
        choices=ATTENTIONS)
    gradient_checkpointing: bool = setting(False, "Recomputes activations in the backward pass: less memory, more "
        "time.")
    trust_remote_code: bool = setting(False, "Runs the Python code that a model repository brings along.")


@dataclass(kw_only=True)
class TrainingConfig:
    """One stage of training."""

    train: str = setting("both", "Parts of the system that train; query_only leaves the passage encoder, and with it "
        "the index, as it is.", choices=(*TRAINS_RETRIEVER, "generator_only", "none"))
    steps: int = setting(250, "Number of optimiser steps.", unit="steps")
    batch_size: int = setting(16, "Number of questions of a micro-batch, for each trainer.", unit="questions", least=1)
    lr_retriever: float = setting(1e-3, "Learning rate of the retriever, after the warm-up.", unit="rate")
    lr_generator: float = setting(2e-3, "Learning rate of the generator, after the warm-up.", unit="rate")
    warmup_steps: int = setting(20, "Number of steps in which the learning rate rises to its full value.", unit="steps")
    retriever_delay_steps: int = setting(0, "Number of steps in which the generator learns alone, before the "
        "retriever's warm-up begins, for objectives that teach the retriever by the generator's verdict (pdist, loop, "
        "adist, reinforce); nothing is refreshed meanwhile.", unit="steps")
    schedule: str = setting("linear", "Learning rate after the warm-up: linear (falls to zero) or constant.",
        choices=("linear", "constant"))
    log_every: int = setting(1, "Number of steps from one line of metrics to the next.", unit="steps", least=1)
    stop_after_nonfinite: int = setting(5, "Number of updates in a row with numbers that are not finite after which "
        "the run stops; each is skipped.", unit="updates", least=1)
    on_collapse: str = setting("warn", "Reaction when retrieval got worse than at the start "
        "(`training/measuring/collapse.py`).", choices=("warn", "stop", "ignore"))


@dataclass(kw_only=True)
class EngineConfig:
    """The optimiser and its distribution over trainers: DeepSpeed."""

    zero_stage: int = setting(0, "ZeRO stage: shards nothing (0), optimiser states (1), gradients too (2), weights too "
        "(3).", choices=(0, 1, 2, 3))
    precision: str = setting("fp32", "Precision: fp32, bf16 (16-bit weights, fp32 masters), bf16_autocast (fp32 "
        "weights, 16-bit compute) or auto (bf16_autocast where the trainers' GPU has products of bf16, or their CPU "
        "has and the matrices are wide; else fp32).", choices=("fp32", "bf16", "bf16_autocast", "auto"))
    gradient_accumulation: int = setting(1, "Number of micro-batches of an optimiser step.", unit="batches", least=1)
    clip_norm: float = setting(1.0, "Norm to which the gradients of retriever and of generator are clipped, each on "
        "its own. 0: not clipped.", unit="norm")
    beta1: float = setting(0.9, "Share of AdamW's running mean of gradients that a step keeps.", unit="share", least=0,
        below=1)
    beta2: float = setting(0.98, "Share of AdamW's running mean of squared gradients that a step keeps.", unit="share",
        least=0, below=1)
    epsilon: float = setting(1e-8, "Number that AdamW adds to its divisor.", unit="number", above=0)
    weight_decay: float = setting(0.0, "Factor of AdamW's decoupled weight decay.", unit="factor")
    offload_optimizer: bool = setting(False, "Keeps optimiser states in the host's memory; needs engine.zero_stage of "
        "1 or more.")
    timeout_s: float = setting(600.0, "Seconds after which a collective operation of the trainers fails.", unit="s",
        above=0)


@dataclass
class CheckpointConfig:
    """The state that a resumed run starts from."""

    every_steps: int = setting(100, "Number of steps from one checkpoint to the next. 0: only at the end.",
        unit="steps")
    keep: int = setting(2, "Number of newest checkpoints that are kept.", unit="checkpoints", least=1)
    index: bool = setting(True, "Names the newest index generation on disk in the checkpoint; a resume serves it.")
    index_every: int = setting(1, "Number of refreshes from one whose generation is written to disk to the next; the "
        "last one of a stage is, too. A large index takes long to write.", unit="refreshes", least=1)


@dataclass
class DecodingConfig:
    """The way in which an answer is written."""

    mode: str = setting("marginal", "Use of the passages: marginal (an answer from each, summed with p(z|q)), fused "
        "(one from all together) or top1 (from the best passage).", choices=DECODINGS)
    num_beams: int = setting(1, "Number of beams. 1: greedy.", unit="beams", least=1)
    max_tokens: int = setting(12, "Number of tokens after which an answer ends.", unit="tokens", least=1)


@dataclass
class NeedleConfig:
    """A sweep over prompts with the labelled passage at a known place among random others; off while it is empty."""

    lengths: list[int] = setting([], "Number of tokens of a prompt and its answer, one row of the sweep each.",
        unit="tokens", least=1, allowed="1 or more tokens")
    depths: list[float] = setting([], "Share of the prompt before the labelled passage, one column each: 0 puts it "
        "first, 1 last.", unit="share", least=0, most=1, allowed="between 0 (first) and 1 (last)")
    num_questions: int = setting(50, "Number of questions that are asked in each cell, the same ones. 0: all.",
        unit="questions")


@dataclass(kw_only=True)
class EvaluationConfig:
    """The measurements of a stage, and their times."""

    every_steps: int = setting(0, "Number of steps from one evaluation during training to the next. 0: only at the "
        "end.", unit="steps")
    max_questions: int = setting(0, "Number of questions of an evaluation during training. 0: all.", unit="questions")
    batch_size: int = setting(32, "Number of questions that are answered together, by each trainer.", unit="questions",
        least=1)
    k: int = setting(100, "Number of hits that the ranking metrics look at.", unit="passages", least=1)
    decoding: DecodingConfig = section(DecodingConfig)
    also: list[str] = setting([], "Further modes at the end: other decodings, closed_book (no passage), gold (the "
        "labelled passage) or long (as much of the corpus as fits).",
        choices=(*DECODINGS, "closed_book", "gold", "long"))
    metrics: list[str] = setting([], "Metrics of your own: module:function or file.py:function, of the answers and the "
        "gold answers of a split.")
    needle: NeedleConfig = section(NeedleConfig)
    examples: int = setting(5, "Number of questions that the report shows with the answers of every stage.",
        unit="questions")


@dataclass(kw_only=True)
class MonitorConfig:
    """Console, metrics.jsonl and W&B."""

    console: bool = setting(True, "Prints metrics on the console.")
    wandb: str = setting("auto", "Mode of W&B; auto is online where a key is found and offline otherwise.",
        choices=("auto", "online", "offline", "off"))
    project: str = setting("tandem", "Project in W&B.")
    entity: str = setting("", "User or team in W&B. Empty: the account's default.")
    init_timeout_s: float = setting(20.0, "Seconds that W&B may take to start before the run goes on without it.",
        unit="s", above=0)
