"""Configuration sections of the corpus and of the index."""

from dataclasses import dataclass, field


@dataclass
class WorldConfig:
    """The synthetic world: invented people, each with one passage per relation (see
    `indexing/corpus/files/world.py`)."""

    num_people: int = 900
    num_values: int = 200  # invented values of each relation
    lookalike_probability: float = 0.4  # chance that a passage also states a true fact about a look-alike
    swap_fraction: float = 1.0  # share of the facts that the dated update changes
    seed: int = 0


@dataclass
class CorpusConfig:
    """Where the passages come from."""

    path: str = ""  # BEIR folder, .jsonl[.gz] or .parquet file; empty: `world` is generated
    format: str = "auto"  # auto | beir | jsonl | parquet
    on_bad: str = "error"  # error | skip: a bad passage (no JSON, broken UTF-8, duplicate id, no text, oversized)
    max_characters: int = 100_000  # longer passages count as oversized
    updates: str = ""  # .jsonl[.gz] of dated {"date","op","_id","title","text"}; empty: the one beside the corpus
    as_of: str = ""  # apply the updates up to this date ("end": all of them); empty: the corpus as it is
    world: WorldConfig = field(default_factory=WorldConfig)


@dataclass
class QuestionsConfig:
    """Where the questions, their answers and their relevance judgements come from."""

    path: str = ""  # folder with queries-SPLIT.jsonl[.gz] and qrels/SPLIT.tsv; empty: the corpus folder
    train: str = "train"  # name of the split to train on; empty: none, for a stage that pretrains on the corpus
    evaluate: str = "test"  # name of the split to evaluate on; empty: none, likewise
    on_bad: str = "error"  # error | skip
    as_of: str = ""  # answers true on this date, from metadata.timeline ("end": the last state); empty: `answers`
    max_questions: int = 0  # 0: all; otherwise a seeded sample of the evaluation split
    # Of several gold answers: first | sampled (another one each time) | in_passage (the first that a gold passage has)
    target: str = "in_passage"
    choice_template: str = "{question} Options: {options}"  # a question or a claim with its options; {options} may lack
    labels: list[str] = field(default_factory=lambda: ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"])  # of a `claim` row
    refusal: str = ""  # answer where the passages hold none, and of questions without answers; empty: none is taught
    refusal_share: float = 0.0  # of the training questions: asked without their gold passages, answer `refusal`
    unanswerable: str = ""  # a split without answers, asked beside the evaluation split: how often the system refuses


@dataclass
class PreferencesConfig:
    """Judged answers: {"prompt","chosen","rejected"} in pairs, or {"prompt","answer","desirable"} one by one, each with
    "split", "positive_passage_id" and "metadata" where known."""

    path: str = ""  # .jsonl[.gz] or a folder with preferences.jsonl[.gz]; empty: the corpus folder, where one is needed
    train: str = "train"  # lines of this split are trained on; a line without a split belongs to it
    evaluate: str = "test"  # pairs of this split are measured; empty: none
    format: str = "auto"  # auto (by the first line) | paired | unpaired: of the file
    on_bad: str = "error"  # error | skip
    max_length_ratio: float = 0.0  # pairs whose word counts differ by a larger factor are left out; 0: none
    max_pairs: int = 0  # measured; 0: all, otherwise a seeded sample


@dataclass
class IndexConfig:
    """One sharded FAISS index."""

    # Flat | SQfp16 (exact) | SQ8 | PQm | IVFn,Flat|SQfp16|SQ8|PQm | OPQm,[IVFn,]PQm | HNSWn[,SQ8]:
    # indexing/dense/kinds.py
    factory: str = "Flat"
    num_shards: int = 2
    device: str = "cpu"  # cpu | gpu
    # float32 | bfloat16: what an exact index on CPU (Flat, SQfp16) finds its candidates by, where the processor has
    # such products: as exact, faster, 2 bytes a number more
    products: str = "float32"
    nprobe: int = 16  # lists visited by IVF kinds
    ef_search: int = 64  # vectors that an HNSW search keeps in view: more find more, and take longer
    ef_construction: int = 80  # the same while HNSW links are made
    training_sample: int = 100_000  # vectors of the new generation that lists, codes and rotations are trained on
    # Proposed by a compressed index (SQ8, PQ), scored again from float16 vectors beside it (2 bytes a number), cut to
    # k; 0: off, otherwise at least retrieval.k
    rescore_candidates: int = 0
    probe_queries: int = 64  # of each shard, to measure every new generation's recall against exact search; 0: none
    keep_generations: int = 2  # snapshots kept on disk beside those that checkpoints name
    search_timeout_s: float = 120.0  # a search that finds no complete generation for so long is an error
    replicas: int = 1  # actors that serve each shard with the same vectors; 1: none to spare
    slow_after_s: float = 0.0  # a shard that has not answered a search by then is slow, and counted; 0: none is
    # wait (up to search_timeout_s) | hedge (ask a replica too) | refuse (the search is an error: for answering, since
    # training ends with it)
    on_slow: str = "wait"


@dataclass
class LexicalConfig:
    """BM25 over title and text of the passages (`indexing/lexical/lexical.py`); built where retrieval.hybrid asks for
    it. How
    many passages have a word is counted when it is built; what is added later is scored by these counts."""

    k1: float = 1.2  # how soon a word that is repeated counts no more
    b: float = 0.75  # how much long passages are discounted: 0 not at all, 1 in full
    stemmer: str = "english"  # a Snowball algorithm (english is Porter2); empty: words as they stand
    stop_words: str = "english"  # a language's list of words that count nothing; empty: all count
    token_pattern: str = r"(?u)\b\w+\b"  # what is a word; one-character ones too, so that digits survive
