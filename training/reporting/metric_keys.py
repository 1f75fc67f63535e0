"""Declares every key of metrics.jsonl and of W&B with its unit and its meaning; docs/metrics.md is generated from it.

Capital parts stand for names: SPLIT is the evaluation split, MODE a decoding of `evaluation.also` (the configured
decoding has no MODE/), TASK a pretraining task, K a cut-off, NAME a name of the user's. Keys of one
optimiser step are means over its micro-batches unless the meaning says otherwise.
"""

Key = tuple[str, str]  # unit, meaning

NUMBER, SHARE, NATS, SECONDS, STEPS, SCORE = "number", "share", "nats", "s", "steps", "0 to 1"

LOSS: dict[str, Key] = {
    "loss/total": (NATS, "value that is minimised, times `objective.scale`"),
    "loss/generator": (NATS, "generator's part of the loss: negative log-likelihood of the answer"),
    "loss/retriever": (NATS, "retriever's part of the loss, before `objective.weight`"),
    "loss/preference": (NATS, "preference term of DPO or KTO"),
    "loss/policy": (NUMBER, "policy term of REINFORCE or GRPO: its gradient matters, its value says little"),
    "loss/objective": (NUMBER, "loss of `objective.function`"),
    "objective/NAME": (NUMBER, "metric NAME that `objective.function` returned"),
    "loss/contrast": (NATS, "InfoNCE of a contrastive task that is mixed with generative ones"),
}
RETRIEVAL: dict[str, Key] = {
    "retrieval/entropy": (NATS, "entropy of p(z|q) over the passages that are read; 0 is one passage, log k uniform"),
    "retrieval/target_entropy": (NATS, "entropy of the distillation target; log k means that it teaches nothing"),
    "retrieval/gold_in_k": (SHARE, "questions with a labelled passage among the K that are read"),
    "retrieval/in_batch_accuracy": (SHARE, "questions whose own passage scores best among all of the batch"),
    "retrieval/utility": (NATS, "REALM: log-likelihood of the answer with passages minus that without"),
    "retrieval/null_probability": (SHARE, "REALM: probability of the empty passage"),
    "retrieval/lexical_weight": (NUMBER, "learned weight of the lexical score (`retrieval.hybrid=learned`)"),
    "retrieval/rescore_s": (SECONDS, "time of scoring candidates again (`retrieval.rescore`), sum of the step"),
    "retrieval/rescore_overlap": (SHARE, "the index's k best that fresh scores keep"),
}
ALIGNMENT: dict[str, Key] = {
    "alignment/accuracy": (SHARE, "pairs (DPO) or judged answers (KTO) on the right side of the reference"),
    "alignment/log_likelihood_accuracy": (SHARE, "pairs whose chosen answer is likelier, without the reference"),
    "alignment/margin": (NUMBER, "`objective.beta` times the difference of both log-ratios"),
    "alignment/chosen_log_ratio": (NATS, "log pi - log ref of the chosen answer"),
    "alignment/chosen_log_likelihood": (NATS, "log-likelihood of the chosen answer, per token"),
    "alignment/kl": (NATS, "KTO: reference point z; sampling: divergence from the reference"),
    "alignment/reward": (NUMBER, "reward of the samples"),
    "alignment/reward_std": (NUMBER, "standard deviation of the rewards of one question; 0 teaches nothing"),
    "alignment/log_prob": (NATS, "log-probability of the samples, passage and answer"),
    "alignment/clipped": (SHARE, "GRPO: samples whose ratio lies outside the clip"),
}
INDEX: dict[str, Key] = {
    "index/generation": (NUMBER, "newest generation that answered in this step"),
    "index/generations_committed": (NUMBER, "generations since the stage began"),
    "index/staleness_steps": (STEPS, "mean age of the hits' vectors: step now minus the step of their weights"),
    "index/staleness_max_steps": (STEPS, "largest such age among the hits of the step"),
    "index/blocked_steps": (NUMBER, "steps so far that waited because of `refresh.max_staleness_steps`"),
    "index/refresh_s": (SECONDS, "duration of the newest refresh, from taking the weights to the commit"),
    "index/refresh_failures": (NUMBER, "failed refreshes so far"),
    "index/refreshed_share": (NUMBER, "corpora encoded by refreshes so far; 2.5 is two and a half times all passages"),
    "index/slow": (NUMBER, "searches so far that met a slow shard (`index.slow_after_s`)"),
    "index/hedged": (NUMBER, "of them those for which a replica was asked, too"),
    "index/refused": (NUMBER, "of them those that were refused (`index.on_slow=refuse`)"),
    "index/bytes_per_passage": ("bytes", "memory of the serving index for each passage"),
    "index/build_s": (SECONDS, "time of building the newest generation from its vectors, slowest shard"),
    "index/recall": (SHARE, "hits of exact search that the index finds, on the last queries"),
}
DRIFT: dict[str, Key] = {
    "drift/overlap": (SHARE, "the index's k best that are among the k best by fresh scores, on the probe"),
    "drift/rank_correlation": ("-1 to 1", "Spearman's rho of the indexed and the fresh order of the candidates"),
    "drift/passage_shift": ("0 to 2", "1 - cosine of indexed and fresh passage vectors"),
    "drift/query_shift": ("0 to 2", "1 - cosine of question vectors at the newest publish and now"),
}
OPTIM: dict[str, Key] = {
    "optim/grad_norm_retriever": (NUMBER, "gradient norm of the retriever before clipping"),
    "optim/grad_norm_generator": (NUMBER, "gradient norm of the generator before clipping"),
    "optim/lr_retriever": (NUMBER, "learning rate of the retriever in this step"),
    "optim/lr_generator": (NUMBER, "learning rate of the generator in this step"),
    "optim/skipped_steps": (NUMBER, "updates so far that were left out because something was not finite"),
}
TIME: dict[str, Key] = {
    "time/step_s": (SECONDS, "whole optimiser step"),
    "time/fetch_s": (SECONDS, "taking the next batch with its hits, waiting included"),
    "time/forward_s": (SECONDS, "forward pass and objective"),
    "time/backward_s": (SECONDS, "backward pass"),
    "time/optimizer_s": (SECONDS, "gradient reduction and update"),
    "time/drift_s": (SECONDS, "measuring drift on the probe"),
    "time/publish_s": (SECONDS, "deciding about a refresh and handing out weights"),
    "time/evaluate_s": (SECONDS, "evaluation before this step"),
    "time/save_s": (SECONDS, "checkpoint before this step"),
    "time/search_wait_s": (SECONDS, "time that the step waited for hits"),
    "time/search_wait_share": (SHARE, "the same as part of the step"),
}
PERF: dict[str, Key] = {
    "perf/questions_per_s": ("1/s", "questions trained on by this trainer"),
    "perf/tokens_per_s": ("1/s", "real tokens of questions, passages and answers"),
    "perf/refresh_passages_per_s": ("1/s", "passages encoded in the newest refresh"),
    "perf/memory_rss_gib": ("GiB", "resident memory of the trainer"),
    "perf/memory_gpu_gib": ("GiB", "peak of the GPU memory that torch allocated"),
}
EVALUATION: dict[str, Key] = {
    "eval/SPLIT/recall@K": (SHARE, "questions with a labelled passage among the K best (hit rate)"),
    "eval/SPLIT/qrel_recall@K": (SHARE, "labelled passages of a question among the K best (recall of trec_eval)"),
    "eval/SPLIT/answer_recall@K": (SHARE, "questions whose answer stands in the text of one of the K best"),
    "eval/SPLIT/ndcg@10": (SCORE, "nDCG of the ten best passages"),
    "eval/SPLIT/mrr": (SCORE, "reciprocal rank of the first labelled passage"),
    "eval/SPLIT/gold_in_k": (SHARE, "questions with a labelled passage among the `retrieval.k` that are read"),
    "eval/SPLIT/index_version": (STEPS, "step of the weights that the answering index was built from"),
    "eval/SPLIT/MODE/exact_match": (SHARE, "answers that equal a gold answer after SQuAD's normalisation"),
    "eval/SPLIT/MODE/f1": (SCORE, "overlap of words with the nearest gold answer"),
    "eval/SPLIT/MODE/log_likelihood": (NATS, "log-likelihood of the gold answer"),
    "eval/SPLIT/MODE/accuracy": (SHARE, "questions with options whose right option was chosen"),
    "eval/SPLIT/MODE/old_exact_match": (SHARE, "answers that equal a former answer, after an update"),
    "eval/SPLIT/MODE/refusal_answerable": (SHARE, "answerable questions that got `questions.refusal`"),
    "eval/SPLIT/MODE/refusal_unanswerable": (SHARE, "unanswerable questions that got `questions.refusal`"),
    "eval/SPLIT/MODE/NAME": (NUMBER, "metric of your function NAME (`evaluation.metrics`)"),
    "eval/SPLIT/preference_accuracy": (SHARE, "held-out pairs whose chosen answer is likelier; a tie counts half"),
    "eval/SPLIT/preference_margin": (NATS, "log-likelihood of the chosen minus the rejected answer"),
    "eval/SPLIT/preference_accuracy_per_token": (SHARE, "the accuracy with log-likelihoods per token"),
    "eval/SPLIT/preference_margin_per_token": (NATS, "the margin with log-likelihoods per token"),
    "eval/SPLIT/preference_recall@K": (SHARE, "prompts with a labelled passage among the K that are read"),
    "eval/held_out/loss": (NATS, "loss per token on held-out pretraining examples"),
    "eval/held_out/log_likelihood": (NATS, "log-likelihood of a held-out example's answer"),
    "eval/held_out/TASK/log_likelihood": (NATS, "the same for the examples of one task"),
}
ROW: dict[str, Key] = {
    "step": (STEPS, "optimiser steps done when the row was written"),
    "time": (SECONDS, "seconds since 1970 when the row was written"),
    "num_nonfinite": (NUMBER, "values of the row that were not finite and stand as null; absent where none was"),
}
METRICS: dict[str, Key] = {
    **ROW, **LOSS, **RETRIEVAL, **ALIGNMENT, **INDEX, **DRIFT, **OPTIM, **TIME, **PERF, **EVALUATION
}  # fmt: skip
