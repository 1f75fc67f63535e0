"""A synthetic world with stores and tokenisers, and a stage on it that trains in seconds on one thread."""

import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from indexing.corpus.files.corpus import iterate_corpus, read_questions
from indexing.corpus.files.world import write_world
from indexing.corpus.stores.duplicates import write_groups
from indexing.corpus.stores.passages import Store, write_store
from indexing.corpus.stores.questions import QuestionStore, write_questions
from indexing.indexing_settings import CorpusConfig, QuestionsConfig, WorldConfig
from tests.helpers.local_index import LocalIndex
from training.job import StageJob, StageSettings
from training.models.text import token_rows
from training.models.text.tokenizers import build_tokenizer, load_tokenizer
from training.training_settings import (
    CheckpointConfig,
    DecodingConfig,
    EncoderConfig,
    EvaluationConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    MonitorConfig,
    RetrievalConfig,
    TokenizerConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class TinyWorld:
    """Stores on disk and the models that fit them."""

    folder: Path
    encoder: EncoderConfig
    generator: GeneratorConfig
    tokenizer: PreTrainedTokenizerFast
    splits: tuple[str, ...] = field(default=("train", "test"))

    @property
    def passages(self) -> Path:
        """Store of the corpus."""
        return self.folder / "passages"

    @property
    def duplicates(self) -> Path:
        """Groups of near-duplicate passages."""
        return self.folder / "duplicates"

    @property
    def tokenizers(self) -> Path:
        """Folder of retriever/ and generator/."""
        return self.folder / "tokenizers"

    def questions(self, split: str) -> Path:
        """Store of the questions of one split."""
        return self.folder / f"questions-{split}"

    def store(self) -> Store:
        """The corpus."""
        return Store.open(self.passages)

    def question_store(self, split: str) -> QuestionStore:
        """The questions of one split."""
        return QuestionStore.open(self.questions(split))

    def index(self, **options: Any) -> LocalIndex:
        """A local index for this world's encoder."""
        return LocalIndex(self.store(), self.encoder, len(self.tokenizer), **options)

    def job(self, run_dir: Path, **changes: Any) -> StageJob:
        """A joint stage of a few steps; `changes` replace its sections and values."""
        job = StageJob(
            settings=StageSettings(
                encoder=self.encoder,
                generator=self.generator,
                retrieval=RetrievalConfig(k=3),
                training=TrainingConfig(steps=6, batch_size=4, warmup_steps=2),
                checkpoint=CheckpointConfig(every_steps=0, index=False),
                evaluation=EvaluationConfig(k=20, batch_size=16, decoding=DecodingConfig(max_tokens=6)),
                monitor=MonitorConfig(console=False, wandb="off"),
            ),
            run_dir=str(run_dir),
            passages=str(self.passages),
            train_questions=str(self.questions("train")),
            evaluate_questions=str(self.questions("test")),
            tokenizers=str(self.tokenizers),
            init_from="",
            seed=3,
            threads=1,
            fingerprint="tiny",
            wait_timeout_s=60.0,
            duplicates=str(self.duplicates),
        )
        return with_changes(job, **changes)


def with_changes(job: StageJob, **changes: Any) -> StageJob:
    """`job` with other sections of its settings and other values."""
    names = {entry.name for entry in fields(StageSettings)}
    settings = replace(job.settings, **{name: value for name, value in changes.items() if name in names})
    return replace(job, settings=settings, **{name: value for name, value in changes.items() if name not in names})


def tiny_encoder(hidden: int = 32, vocabulary: int = 700) -> EncoderConfig:
    """One layer."""
    return EncoderConfig(
        fresh=FreshEncoderConfig(num_layers=1, hidden=hidden, num_heads=2, intermediate=2 * hidden),
        tokenizer=TokenizerConfig(vocabulary=vocabulary),
    )


def tiny_generator(hidden: int = 32) -> GeneratorConfig:
    """One layer of each kind."""
    fresh = FreshGeneratorConfig(
        num_encoder_layers=1, num_decoder_layers=1, hidden=hidden, num_heads=2, intermediate=2 * hidden
    )
    return GeneratorConfig(fresh=fresh, max_answer_tokens=8)


def make_world(
    folder: Path, world: WorldConfig, encoder: EncoderConfig | None = None, generator: GeneratorConfig | None = None
) -> TinyWorld:
    """Generate the world, train its tokeniser, and write the stores under `folder`."""
    encoder, generator = encoder or tiny_encoder(), generator or tiny_generator()
    write_world(world, folder / "world")
    corpus, questions = CorpusConfig(path=str(folder / "world")), QuestionsConfig(path=str(folder / "world"))
    passages = list(iterate_corpus(corpus)[0])
    asked = {split: read_questions(questions, split) for split in ("train", "test")}
    texts = [f"{passage.title} {passage.text}" for passage in passages] + [q.text for q in asked["train"]]
    tokenizer = build_tokenizer(
        "", encoder.tokenizer, texts=iter(texts), save_dir=folder / "tokenizers" / "retriever", trust_remote_code=False
    )
    shutil.copytree(folder / "tokenizers" / "retriever", folder / "tokenizers" / "generator")
    reader_tokenizer = load_tokenizer(folder / "tokenizers" / "generator")
    made = TinyWorld(folder, encoder, generator, tokenizer)
    passage_sides = [
        token_rows.retriever_passage_side(tokenizer, encoder),
        token_rows.generator_passage_side(reader_tokenizer, generator, encoder.max_title_tokens),
    ]
    store = write_store(made.passages, passages, passage_sides)
    write_groups(made.duplicates, store, "generator", 0.7)
    question_sides = [
        token_rows.retriever_question_side(tokenizer, encoder),
        token_rows.generator_question_side(reader_tokenizer, generator),
    ]
    answer_side = token_rows.generator_answer_side(reader_tokenizer, generator)
    for split, rows in asked.items():
        write_questions(made.questions(split), rows, sides=question_sides, answer_side=answer_side, store=store)
    return made
