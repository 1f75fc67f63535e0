"""Describes the verbs of the command line. The printed help and the page docs/cli.md are made from these."""

from dataclasses import dataclass
from fnmatch import fnmatch
from textwrap import fill, indent

from cluster.config.setting_names import DECLARED

CONFIGURATION = "[config.yaml | run folder ...] [section.field=value ...]"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """The description of one verb."""

    summary: str  # one line of the list of verbs
    usage: str = CONFIGURATION
    does: str
    reads: str
    writes: str
    options: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...]  # whole command lines
    settings: tuple[str, ...] = ()  # names that matter most to it, or patterns of names like retrieval.*


VERBS = {
    "train": Verb(
        summary="train every stage, from where an earlier call of the same run stopped",
        does="Prepares the data, starts or joins Ray, trains the stages in order, applies the update of the file and "
        "writes a summary. The same command goes on from the newest checkpoint; finished stages are not run again.",
        reads="the configuration, corpus, questions and models that it names, and what an earlier call left",
        writes="runs/<run.name>/: summary.json, report.html, and for each stage checkpoints, metrics.jsonl",
        examples=(
            "tandem train configs/quickstart.yaml run.seed=1",
            "tandem train configs/quickstart.yaml training.steps=50 stages.joint.retrieval.k=8",
        ),
        settings=("run.*", "training.*", "cluster.num_trainers", "cluster.check_fit", "cluster.dry_run"),
    ),
    "prepare": Verb(
        summary="read, check and tokenise corpus and questions into the store",
        does="Reads corpus, questions and preferences, refuses or skips bad lines, trains tokenisers where models are "
        "fresh, and writes the store. The other verbs do the same first, and find it done.",
        reads="the configuration, and the corpus, questions and preferences that it names",
        writes="runs/<run.name>/data/ and runs/<run.name>/tokenizers/",
        examples=(
            "tandem prepare configs/quickstart.yaml",
            "tandem prepare configs/quickstart.yaml corpus.on_bad=skip",
        ),
        settings=("corpus.*", "questions.*", "encoder.tokenizer.*"),
    ),
    "index": Verb(
        summary="encode the corpus with a trained encoder and build the index",
        does="Encodes the last stage's corpus with its newest checkpoint, and builds and saves the index.",
        reads="the configuration and the newest checkpoint of the last stage",
        writes="a folder of its own in the run folder of the stage",
        examples=("tandem index configs/quickstart.yaml", "tandem index runs/quickstart/joint index.factory=SQ8"),
        settings=("index.*", "refresh.num_workers", "refresh.batch_tokens"),
    ),
    "evaluate": Verb(
        summary="measure a trained system on the evaluation questions; with update.as_of=DATE after that update too",
        does="Builds the index of the last stage's newest checkpoint and measures retrieval and answers on the "
        "evaluation split. With update.as_of it measures again after the update of the corpus.",
        reads="the configuration, the newest checkpoint of the last stage, and the evaluation split",
        writes="a folder of its own in the run folder of the stage, and the summary of the run",
        examples=(
            "tandem evaluate configs/quickstart.yaml",
            "tandem evaluate runs/quickstart/joint update.as_of=end evaluation.also=[gold,closed_book]",
        ),
        settings=("evaluation.*", "questions.evaluate", "update.as_of"),
    ),
    "compare": Verb(
        summary="run the matrix of the file's compare section, cell by cell, and write one table",
        does="Trains every cell of the compare section with every seed, one after the other, and compares each with "
        "the baseline. Finished cells are not run again. Exit code 1 when a cell failed.",
        reads="a configuration with a compare section",
        writes="runs/<run.name>/compare/: comparison.json, report.html, and a run folder for each cell and seed",
        examples=(
            "tandem compare configs/compare_quickstart.yaml",
            "tandem compare configs/compare_quickstart.yaml compare.seeds=[0]",
        ),
        settings=("compare.*",),
    ),
    "corpus": Verb(
        summary="add, delete or update passages of a run, while it trains or afterwards: corpus add RUN new.jsonl",
        usage="add|update RUN file.jsonl, delete RUN id ... | --file ids.txt, show RUN",
        does="Changes the corpus of a run. Where a job serves the run, it waits until the change is served; otherwise "
        "the next train, evaluate or ask encodes what is new. `show` prints versions and counts.",
        reads="the run folder, and a .jsonl[.gz] file of passages or the ids on the command line",
        writes="the log of changes in the run folder",
        options=(("--file ids.txt", "delete: reads the ids from a file, one a line"),),
        examples=(
            "tandem corpus add runs/quickstart/joint new.jsonl",
            "tandem corpus delete runs/quickstart/joint some-id another-id",
        ),
        settings=("corpus.max_characters",),
    ),
    "ask": Verb(
        summary='answer one question: ask "question" ["put otherwise" ...] [config.yaml ...]',
        usage=f'"question" ["put otherwise" ...] {CONFIGURATION}',
        does="Answers a question from the last stage's newest checkpoint and prints the passages that were read with "
        "their scores. Further phrasings are searched too, and the rankings fused. Starts no Ray.",
        reads="the configuration and the newest checkpoint of the last stage",
        writes="nothing but what prepare writes where it is missing",
        examples=(
            'tandem ask "Who wrote it?" configs/quickstart.yaml',
            'tandem ask "Who wrote it?" "Name of the author?" configs/quickstart.yaml',
        ),
        settings=("retrieval.k", "retrieval.where", "retrieval.hybrid", "evaluation.decoding.*"),
    ),
    "plan": Verb(
        summary="does a run fit, on what, how stale is its index, what does it cost; starts nothing (--json: numbers)",
        usage=f"[--json] {CONFIGURATION}",
        does="Computes the smallest placement that fits each stage, its memory, time and cost, and how stale its index "
        "will be. Needs no GPU, no weights and no network.",
        reads="the configuration, the prepared store or the corpus, and the configurations of the models",
        writes="nothing; prints a table for each stage and one line of JSON",
        options=(("--json", "prints the line of JSON alone"),),
        examples=(
            "tandem plan configs/quickstart.yaml",
            "tandem plan configs/cluster_nq.yaml plan.gpu=h100 plan.passages=21000000",
        ),
        settings=("plan.*", "cluster.memory_margin"),
    ),
    "show": Verb(
        summary="print the resolved configuration of every stage and where its run lies (--changed: not the defaults)",
        usage=f"[--changed] {CONFIGURATION}",
        does="Resolves files and overrides, checks them, and prints the settings of every stage as YAML.",
        reads="the configuration",
        writes="nothing",
        options=(("--changed", "prints only settings that differ from the defaults, as one file that can be loaded"),),
        examples=(
            "tandem show configs/quickstart.yaml",
            "tandem show --changed configs/quickstart.yaml training.steps=50",
        ),
    ),
    "settings": Verb(
        summary="list settings with default, allowed values and meaning: settings [PATTERN]",
        usage="[PATTERN]",
        does="Lists the settings whose name contains PATTERN or matches it as a pattern like refresh.*, else those "
        "whose meaning has the word. Exit code 2 when there is none.",
        reads="nothing",
        writes="nothing",
        examples=("tandem settings retrieval.k", "tandem settings staleness"),
    ),
    "test": Verb(
        summary="run every check: lint, format, types, import rules, tests; what follows goes to pytest",
        usage="[pytest options]",
        does="Runs lint, format, types, import rules and the tests, up to the first that fails.",
        reads="the project",
        writes="nothing",
        examples=("tandem test", "tandem test tests/indexing -x"),
    ),
}
DEFAULT_VERB = "train"

HELP = """usage: tandem [VERB] [config.yaml | run folder ...] [section.field=value ...]

Trains a retriever and a generator as one system, with the index of the whole corpus refreshed beside the training.

{verbs}

`tandem VERB --help` explains one of them, `tandem settings` every setting. Without a verb: train. Without a file:
configs/quickstart.yaml. Later files win over earlier ones, section.field=value over all (run.init_from: where the
first stages start); stages.NAME.section.field=value is for one stage. Runs lie in runs/<run.name>/.

examples:
{examples}"""


def overview() -> str:
    """Return the help of the whole command line."""
    examples = "\n".join(f"  {verb.examples[0]}" for verb in VERBS.values())
    return HELP.format(verbs="\n".join(f"  {name:9} {verb.summary}" for name, verb in VERBS.items()), examples=examples)


def verb_help(name: str) -> str:
    """Return the help of one verb: usage, what it does, reads and writes, options, examples, settings."""
    verb = VERBS[name]
    rows = [("reads", verb.reads), ("writes", verb.writes), *verb.options]
    parts = [f"usage: tandem {name} {verb.usage}", fill(verb.does, 118), _table(rows, 118)]
    parts.append("\n".join(["examples:", *(f"  {example}" for example in verb.examples)]))
    if verb.settings:
        named = [name for name in DECLARED if any(fnmatch(name, pattern) for pattern in verb.settings)]
        rows = [(setting, DECLARED[setting][1].meaning) for setting in named]
        parts.append(f"settings that matter to it (tandem settings lists all):\n{indent(_table(rows, 116), '  ')}")
    return "\n\n".join(parts)


def _table(rows: list[tuple[str, str]], width: int) -> str:
    """Return (label, text) rows as two columns, wrapped at `width` characters."""
    column = max(len(label) for label, _ in rows) + 2
    return "\n".join(fill(f"{label:{column}}{text}", width, subsequent_indent=" " * column) for label, text in rows)
