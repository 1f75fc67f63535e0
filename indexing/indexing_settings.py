"""Settings of the corpus, its questions and preferences, and of the dense and the lexical index."""

from dataclasses import dataclass

from indexing.declare import POINT_VALUES, is_point, section, setting

ON_BAD = ("error", "skip")
FACTORIES = "Flat, SQfp16, SQ8, PQm, IVFn,Flat|SQfp16|SQ8|PQm, HNSWn[,SQfp16|SQ8], and OPQm, before PQm or IVFn,PQm"


# A table of settings, laid out by hand.
# fmt: off


@dataclass(kw_only=True)
class WorldConfig:
    """The synthetic world: invented people, each with one passage per relation."""

    num_people: int = setting(900, "Number of invented people; each has one passage per relation.", unit="people",
        least=10)
    num_values: int = setting(200, "Number of invented values of each relation.", unit="values", least=2, most=20_000)
    lookalike_probability: float = setting(0.4, "Chance that a passage also states a true fact about a look-alike.",
        unit="chance", least=0, most=1)
    swap_fraction: float = setting(1.0, "Share of the facts that the dated update changes.", unit="share", least=0,
        most=1)
    seed: int = setting(0, "Seed of the world: equal settings give equal worlds.")


@dataclass(kw_only=True)
class CorpusConfig:
    """The source of the passages."""

    path: str = setting("", "BEIR folder, or .jsonl[.gz] or .parquet file, of passages. Empty: `corpus.world` is "
        "generated.")
    format: str = setting("auto", "Format of the corpus; auto goes by the path.",
        choices=("auto", "beir", "jsonl", "parquet"))
    on_bad: str = setting("error", "Treatment of a bad passage (no JSON, broken UTF-8, duplicate id, no text, "
        "oversized): stop, or leave it out.", choices=ON_BAD)
    max_characters: int = setting(100_000, "Number of characters from which a passage counts as oversized.",
        unit="characters", least=1)
    updates: str = setting("", "File (.jsonl[.gz]) of dated updates of the corpus. Empty: updates.jsonl[.gz] beside "
        "the corpus.")
    as_of: str = setting("", "Date up to which the updates are applied (end: all of them). Empty: the corpus as it is.",
        holds=is_point, allowed=POINT_VALUES)
    world: WorldConfig = section(WorldConfig)


@dataclass(kw_only=True)
class QuestionsConfig:
    """The source of the questions, of their answers and of their relevance judgements."""

    path: str = setting("", "Folder with queries-SPLIT.jsonl[.gz] and qrels/SPLIT.tsv. Empty: the folder of the "
        "corpus.")
    train: str = setting("train", "Split to train on. Empty: none, for a stage that pretrains on the corpus.")
    evaluate: str = setting("test", "Split to evaluate on. Empty: none.")
    on_bad: str = setting("error", "Treatment of a bad line: stop, or leave it out.", choices=ON_BAD)
    as_of: str = setting("", "Date on which the answers shall be true, from metadata.timeline (end: the last state). "
        "Empty: `answers` holds.", holds=is_point, allowed=POINT_VALUES)
    max_questions: int = setting(0, "Number of questions of the evaluation split, a seeded sample. 0: all.",
        unit="questions")
    target: str = setting("in_passage", "Gold answer that is trained on where there are several: the first, another "
        "one each time, or the first that a gold passage contains.", choices=("first", "sampled", "in_passage"))
    choice_template: str = setting("{question} Options: {options}", "Text of a question or claim that has options; "
        "{options} may be left out.")
    labels: list[str] = setting(["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"], "Options of a row that has a `claim` "
        "instead of a question.")
    refusal: str = setting("", "Answer of questions that have none, and where the passages hold none. Empty: refusing "
        "is not taught.")
    refusal_share: float = setting(0.0, "Share of the training questions that are asked without their gold passages "
        "and answered by `questions.refusal`.", unit="share", least=0, most=1)
    unanswerable: str = setting("", "Split without answers, asked beside the evaluation split to measure how often the "
        "system refuses. Empty: none.")


@dataclass(kw_only=True)
class PreferencesConfig:
    """Judged answers: {"prompt","chosen","rejected"} in pairs, or {"prompt","answer","desirable"} one by one, each with
    "split", "positive_passage_id" and "metadata" where known."""

    path: str = setting("", "File (.jsonl[.gz]), or folder with preferences.jsonl[.gz]. Empty: the folder of the "
        "corpus, where one is needed.")
    train: str = setting("train", "Split whose lines are trained on; a line without a split belongs to it.")
    evaluate: str = setting("test", "Split whose pairs are measured. Empty: none.")
    format: str = setting("auto", "Kind of judgements in the file; auto goes by its first line.",
        choices=("auto", "paired", "unpaired"))
    on_bad: str = setting("error", "Treatment of a bad line: stop, or leave it out.", choices=ON_BAD)
    max_length_ratio: float = setting(0.0, "Factor between the word counts of a pair's answers beyond which it is left "
        "out. 0: no pair is.", unit="factor")
    max_pairs: int = setting(0, "Number of pairs that are measured, a seeded sample. 0: all.", unit="pairs")


@dataclass(kw_only=True)
class IndexConfig:
    """The dense index: FAISS, sharded."""

    factory: str = setting("Flat", f"Kind of index (`indexing/dense/kinds.py`), in FAISS's words: {FACTORIES}.")
    num_shards: int = setting(2, "Number of shards that the corpus is cut into.", unit="shards", least=1)
    device: str = setting("cpu", "Device that searches.", choices=("cpu", "gpu"))
    products: str = setting("float32", "Precision of the products by which an exhaustive index on CPU (Flat, SQfp16) "
        "finds its candidates, where the processor has such products. bfloat16: as exact in the end, faster, and 2 "
        "bytes a number more.", choices=("float32", "bfloat16"))
    nprobe: int = setting(16, "Number of lists that a search of an IVF index visits.", unit="lists", least=1)
    ef_search: int = setting(64, "Number of vectors that an HNSW search keeps in view: more find more and take longer.",
        unit="vectors", least=1)
    ef_construction: int = setting(80, "Number of vectors kept in view while HNSW links are made.", unit="vectors",
        least=1)
    training_sample: int = setting(100_000, "Number of vectors of a new generation that lists, codes and rotations are "
        "trained on.", unit="vectors", least=1)
    rescore_candidates: int = setting(0, "Number of hits that a compressed index (SQ8, PQ) proposes; they are scored "
        "again from float16 vectors beside it (2 bytes a number) and cut to k. 0: off; otherwise at least retrieval.k.",
        unit="passages")
    probe_queries: int = setting(64, "Number of queries of each shard on which a new generation's recall is measured "
        "against exact search. 0: none.", unit="queries")
    keep_generations: int = setting(2, "Number of snapshots kept on disk beside those that checkpoints name.",
        unit="generations", least=1)
    search_timeout_s: float = setting(120.0, "Seconds without a complete generation after which a search fails.",
        unit="s", above=0)
    replicas: int = setting(1, "Number of actors that serve each shard with the same vectors. 1: none to spare.",
        unit="actors", least=1)
    slow_after_s: float = setting(0.0, "Seconds after which a shard that has not answered a search counts as slow. 0: "
        "no shard does.", unit="s")
    on_slow: str = setting("wait", "Treatment of a slow shard: wait for it (up to search_timeout_s), ask a replica too "
        "(hedge), or fail the search (refuse; for answering, since training ends with it).",
        choices=("wait", "hedge", "refuse"))


@dataclass(kw_only=True)
class LexicalConfig:
    """The lexical index: BM25 over title and text of the passages, built where retrieval.hybrid asks for it. Document
    frequencies are counted when it is built; passages that are added later are scored by these."""

    k1: float = setting(1.2, "BM25's saturation: the smaller, the sooner a repeated word counts no more.",
        unit="factor")
    b: float = setting(0.75, "Share of the length discount of long passages: 0 none, 1 in full.", unit="share", least=0,
        most=1)
    stemmer: str = setting("english", "Snowball algorithm (english is Porter2). Empty: words are not stemmed.")
    stop_words: str = setting("english", "Language whose list of stop words is ignored. Empty: every word counts.")
    token_pattern: str = setting(r"(?u)\b\w+\b", "Regular expression of a word; the default takes one-character words "
        "too, so that digits survive.")
