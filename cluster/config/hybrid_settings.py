"""Checks the settings of lexical search beside vectors, and those of the re-ranker."""

from cluster.config.settings import Settings
from indexing.declare import refuse
from indexing.lexical.lexical_check import check_lexical
from training.feeding.mixture import pretrains
from training.training_settings import CONTRASTIVE

SEARCHES = ("index", "fixed", "gold")  # values of retrieval.source that ask the index


def check_hybrid(settings: Settings) -> None:
    """Refuse settings of `retrieval.hybrid`, `lexical` and `reranker` that contradict each other or the rest. A stage
    that searches nothing ignores them. Raises ValueError."""
    check_lexical(settings.lexical)
    if settings.objective.name in CONTRASTIVE:
        return
    retrieval, reranker = settings.retrieval, settings.reranker
    if retrieval.hybrid != "none":
        if retrieval.source not in SEARCHES:
            allowed = f"must be none with retrieval.source={retrieval.source}, which searches no index"
            raise refuse("retrieval.hybrid", retrieval.hybrid, allowed)
        if settings.index.on_slow == "refuse":
            allowed = (
                f"must be wait or hedge with retrieval.hybrid={retrieval.hybrid}: one process has the lexical index"
            )
            raise refuse("index.on_slow", "refuse", f"{allowed}, and is waited for up to index.search_timeout_s")
        if retrieval.candidates < retrieval.k:
            allowed = f"must be at least retrieval.k={retrieval.k}: the passages that are read are chosen among them"
            raise refuse("retrieval.candidates", retrieval.candidates, allowed)
    if retrieval.hybrid != "none":
        deepest = retrieval.k if reranker.mode == "off" else max(retrieval.k, reranker.candidates)
        wanted = deepest * max(1, retrieval.rescore)
        if retrieval.candidates < wanted:
            again = f"retrieval.rescore={retrieval.rescore} times " if wanted > deepest else ""
            chosen = "retrieval.k" if deepest == retrieval.k else "reranker.candidates"
            allowed = f"must be at least {wanted}: {again}{chosen}={deepest} are chosen among those that are fused"
            raise refuse("retrieval.candidates", retrieval.candidates, allowed)
    if reranker.mode == "off":
        return
    if reranker.mode == "replace" and retrieval.rescore > 1:
        allowed = "must be 0 with reranker.mode=replace: the retriever does not train, its index is never stale"
        raise refuse("retrieval.rescore", retrieval.rescore, allowed)
    if retrieval.source not in SEARCHES:
        allowed = f"must be off with retrieval.source={retrieval.source}, which searches no index"
        raise refuse("reranker.mode", reranker.mode, allowed)
    if reranker.candidates < retrieval.k:
        allowed = f"must be at least retrieval.k={retrieval.k}: the passages that are read are chosen among them"
        raise refuse("reranker.candidates", reranker.candidates, allowed)
    if reranker.mode == "replace" and retrieval.hybrid == "learned":
        allowed = "must be none or rrf with reranker.mode=replace: no gradient reaches the weight of lexical scores"
        raise refuse("retrieval.hybrid", "learned", allowed)
    if reranker.name and pretrains(settings.pretraining):
        allowed = "must be empty (a fresh re-ranker) with a section pretraining: examples have the retriever's tokens"
        raise refuse("reranker.name", reranker.name, allowed)
