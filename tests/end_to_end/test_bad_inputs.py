"""Bad inputs, one line each: exit code 2 and a message that names the setting, or file and line, before Ray starts."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from cluster import cli
from cluster.commands.train import starting_checkpoint
from cluster.config.experiment import load
from cluster.machines import session
from indexing.corpus import snapshot

QUICKSTART = "configs/quickstart.yaml"
CLUSTER = "configs/cluster_nq.yaml"
PASSAGES = [{"_id": f"p{i}", "title": f"Title {i}", "text": f"Passage number {i} is about item {i}."} for i in range(8)]
QUESTIONS = [{"_id": f"q{i}", "text": f"what is item {i}?", "answers": [f"item {i}"]} for i in range(4)]


def lines(rows: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


GOOD, ASKED = lines(PASSAGES), lines(QUESTIONS)

# What is wrong with the arguments: the file, its overrides, what the message says.
ARGUMENTS = [
    (QUICKSTART, "training.stepz=5", "unknown setting training.stepz. Did you mean training.steps?"),
    (QUICKSTART, "training.steps=many", "training.steps: value 'many' must be a whole number"),
    (QUICKSTART, "training.steps=-1", "training.steps=-1: must not be negative"),
    (QUICKSTART, "engine.precision=fp16", "engine.precision=fp16: must be one of fp32, bf16, bf16_autocast, auto"),
    (QUICKSTART, "retrieval.prefetch_depth=-1", "retrieval.prefetch_depth=-1: must not be negative"),
    (QUICKSTART, "retrieval.k=0", "retrieval.k=0: must be at least 1"),
    (QUICKSTART, "generator.name=no-such-model", "generator.name=no-such-model: must have a tokeniser"),
    (
        QUICKSTART,
        "stages.warm_start.training.train=both",
        "stage warm_start: training.train=both: must be retriever",
    ),
    (
        QUICKSTART,
        "generator.kind=causal stages.joint.objective.name=fused",
        "stage joint: generator.kind=causal: must be copy or fusion",
    ),
    (
        QUICKSTART,
        "generator.kind=causal generator.fresh.hidden=126 generator.fresh.num_heads=6",
        "generator.fresh.hidden=126: must be a multiple of 2 * num_heads=12 with generator.kind=causal",
    ),
    (QUICKSTART, "refresh.max_staleness_steps=10", "refresh.max_staleness_steps=10: must be 0 (no bound) or at least"),
    (
        QUICKSTART,
        "index.factory=PQ64",
        "index.factory=PQ64: must train on at most 60 vectors, those of a shard, but needs 256",
    ),
    (QUICKSTART, "update.as_of=tomorrow", 'update.as_of=tomorrow: must be empty, "end" or a date'),
    (QUICKSTART, "cluster.num_trainers=1000", "no node has room for trainer"),
    (QUICKSTART, "cluster.trainer_gpus=100", "and no node has room for trainer 1 of 1 (1 CPU, 100 GPU)"),
    (
        QUICKSTART,
        "run.init_from=no/such/run",
        "stage warm_start: run.init_from=no/such/run: must be a checkpoint or run folder",
    ),
    (QUICKSTART, "encoder.name=/no/such/folder", "encoder.name=/no/such/folder: must be a folder that exists"),
    (QUICKSTART, "encoder.name=no-such-model", "encoder.name=no-such-model: must have a tokeniser"),
    (
        QUICKSTART,
        "generator.kind=fusion generator.name=./no/such/folder",
        "generator.name=./no/such/folder: must be a folder that exists",
    ),
    (QUICKSTART, "retrieval.hybrid=bm25", "retrieval.hybrid=bm25: must be one of none, rrf, learned"),
    (
        QUICKSTART,
        "reranker.mode=add reranker.name=/no/such/folder",
        "reranker.name=/no/such/folder: must be a folder that exists",
    ),
    (QUICKSTART, "encoder.tokenizer.vocabulary=10", "encoder.tokenizer.vocabulary=10: must be at least"),
    (QUICKSTART, "corpus.path=/no/such/corpus", "corpus.path=/no/such/corpus: must be a BEIR folder"),
    (QUICKSTART, "corpus.world.num_people=1", "corpus.world.num_people=1: must be at least 10"),
    (CLUSTER, "cluster.dry_run=true cluster.num_trainers=1000", "no node has room for trainer"),
    (CLUSTER, "cluster.dry_run=true cluster.dry_run_nodes=1x0x4", "it wants 6 CPU and 0 GPU, and no node has room"),
    (
        CLUSTER,
        "cluster.dry_run=true cluster.dry_run_nodes=2x8",
        "cluster.dry_run_nodes=2x8: must be MACHINESxGPUSxCPUS",
    ),
    (
        CLUSTER,
        "cluster.dry_run=true cluster.dry_run_nodes=1x2x96",
        "it wants 6 CPU and 6 GPU, and no node has room for",
    ),
]

# What is wrong with the data: the file, its content, further settings, what the message says.
DATA = [
    ("corpus.jsonl", GOOD + b'{"_id": "p9", \n', "", "corpus.jsonl:9: not_json: "),
    ("corpus.jsonl", GOOD + b"[1, 2]\n", "", "corpus.jsonl:9: not_json: a list, not an object"),
    ("corpus.jsonl", b'{"_id": "x", "text": "\xff"}\n' + GOOD, "", "corpus.jsonl:1: broken_utf8: byte 23 of the line"),
    (
        "corpus.jsonl",
        GOOD + GOOD[: GOOD.index(b"\n") + 1],
        "",
        "corpus.jsonl:9: duplicate_id: id 'p0' was there",
    ),
    ("corpus.jsonl", GOOD + lines([{"_id": "p9", "text": " "}]), "", "corpus.jsonl:9: empty_text: passage 'p9' has no"),
    ("corpus.jsonl", GOOD, "corpus.max_characters=20", "corpus.jsonl:1: oversized_text: passage 'p0' has"),
    ("corpus.jsonl", GOOD + lines([{"text": "x"}]), "", "corpus.jsonl:9: missing_field: _id is None"),
    ("corpus.jsonl", b"", "", "must have passages, but is empty"),
    ("corpus.jsonl.gz", gzip.compress(GOOD)[:-9], "", "is a damaged gzip file, after line"),
    ("queries-train.jsonl", ASKED + b"{\n", "", "queries-train.jsonl:5: not_json"),
    ("queries-train.jsonl", b"", "", "queries-train.jsonl has no questions of split 'train'"),
    ("queries-test.jsonl", b"", "", "queries-test.jsonl has no questions of split 'test'"),
    (
        "queries-test.jsonl",
        ASKED,
        "questions.evaluate=dev",
        "must have queries-dev.jsonl[.gz] or queries.jsonl",
    ),
    (
        "qrels/test.tsv",
        b"query-id\tcorpus-id\tscore\nq1 p1 1\n",
        "",
        "test.tsv:2: missing_field: needed are question",
    ),
    ("qrels/test.tsv", b"", "retrieval.k=9", "retrieval.k=9: must be 1 to 8, the passages of the index"),
    ("qrels/test.tsv", b"", "index.num_shards=9", "index.num_shards=9: must be 1 to 8, the number of passages"),
    ("qrels/test.tsv", b"", "index.factory=IVF5,Flat", "must have 1 to 4 lists: a shard holds 4 vectors"),
    (
        "qrels/test.tsv",
        b"",
        "corpus.as_of=end",
        "corpus.as_of=end: must be empty, since there is no updates.jsonl[.gz] beside",
    ),
]

Refusal = Callable[..., str]


def write_checkpoint(run_dir: Path, step: int) -> Path:
    """A folder that is complete, as far as names and checksums tell."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    snapshot.write_manifest(folder, {"step": step})
    return folder


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Call the command line in this process, where Ray must not start; what it says, with exit code 2."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(session, "start_or_join", started)

    def call(*arguments: str) -> str:
        code = cli.main([*arguments, f"run.directory={tmp_path / 'runs'}"])
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("tandem: ")
        return said

    return call


@pytest.mark.parametrize(("file", "overrides", "expected"), ARGUMENTS, ids=lambda value: value[:60])
def test_bad_arguments(file: str, overrides: str, expected: str, refusal: Refusal) -> None:
    said = refusal("train", file, "corpus.world.num_people=20", *overrides.split())
    assert expected in said
    assert said.count("\n") == 1 or "placement on" in said


@pytest.mark.parametrize(("name", "content", "override", "expected"), DATA)
def test_bad_data(name: str, content: bytes, override: str, expected: str, refusal: Refusal, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    if not name.startswith("corpus"):
        (data / "corpus.jsonl").write_bytes(GOOD)
    for split in ("train", "test"):
        (data / f"queries-{split}.jsonl").write_bytes(ASKED)
    (data / name).write_bytes(content)
    config = tmp_path / "a.yaml"
    config.write_text(f"corpus: {{path: {data}}}\nencoder: {{tokenizer: {{vocabulary: 300}}}}", encoding="utf-8")
    said = refusal("train", str(config), *override.split())
    assert expected in said
    assert said.count("\n") == 1 or "lines read" in said


def test_run_of_other_settings_is_not_resumed(refusal: Refusal, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "first"
    write_checkpoint(run_dir, 5)
    (run_dir / "config.yaml").write_text("run: {name: first}\nobjective: {name: emdr2}", encoding="utf-8")
    config = tmp_path / "a.yaml"
    config.write_text("run: {name: first}\nobjective: {name: emdr2}", encoding="utf-8")
    for change, shown in (("run.seed=7", "0"), ("objective.name=pdist", "'emdr2'"), ("encoder.fresh.hidden=64", "128")):
        said = refusal("train", str(config), change)
        assert f"{change}: {run_dir} was trained with {shown}: take another run.name, or set run.overwrite=true" in said


def test_torn_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    refusal: Refusal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "first"
    whole, torn = write_checkpoint(run_dir, 5), write_checkpoint(run_dir, 6)
    (torn / "model.safetensors").write_bytes(b"Weights" * 6)  # a flipped bit
    settings = load([], [f"run.init_from={run_dir}"]).settings
    assert starting_checkpoint(settings, {"": settings}) == str(whole)
    printed = capsys.readouterr().out
    assert printed == f"{torn} is incomplete or damaged: model.safetensors differs from its checksum\n"
    (whole / "manifest.json").unlink()
    said = refusal("train", QUICKSTART, f"run.init_from={run_dir}")
    assert f"run.init_from={run_dir}: must be a checkpoint or run folder" in said


def test_dry_run_prints_the_placement_without_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "start_or_join", None)
    assert cli.main(["train", CLUSTER, "cluster.dry_run=true", "cluster.dry_run_nodes=2x8x96"]) == 0
    printed = capsys.readouterr().out
    for part in ("2 node(s) with 192 CPU and 16 GPU", "6 x trainer", "ZeRO 2", "IVF8192,Flat on 8 shards"):
        assert part in printed


def test_cluster_recipe_resolves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", CLUSTER]) == 0
    printed = capsys.readouterr().out
    for part in ("name: facebook/contriever", "name: google/t5-base-lm-adapt", "zero_stage: 2", "num_shards: 8"):
        assert part in printed
