"""The verb plan end to end, and the same numbers as a refusal before a launch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import cli
from cluster.config.experiment import load
from cluster.config.settings import Settings
from cluster.planning.check_fit import check_fit
from cluster.planning.hardware import GB, known_gpu, this_host
from cluster.planning.placement import Node, gpu_memory
from cluster.planning.placement import plan as seat
from cluster.planning.plan import work_of
from cluster.planning.sizing import shard_bytes, trainer_bytes
from tests.indexing.helpers import make_store

SIZES = ["plan.encoder=12x768x30522", "plan.generator=24x768x32128", "generator.kind=fusion"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict]:
    """The table and the numbers of a file's only stage."""
    assert cli.main(["plan", *arguments]) == 0
    *lines, numbers = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(numbers)[0]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("run: {name: a}", encoding="utf-8")
    return "a.yaml"


def test_a_thousand_passages_stay_on_the_cpu(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, numbers = planned(capsys, file, "plan.gpu=cpu", "plan.passages=1000")
    assert (numbers["gpu"], numbers["gpus"], numbers["nodes"]) == ("cpu", 0, 1)
    assert numbers["passages"] == 1000
    assert numbers["shard_serving_bytes"] == 1000 * 128 * 4
    assert "1 trainer(s), 1 shard(s), 1 refresh worker(s)" in table
    assert "tokens a passage: encoder.max_passage_tokens" in table


def test_a_billion_passages_have_an_answer(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    large = ["plan.passages=1000000000", "plan.gpu=h200", "plan.gpus=1024", "index.device=gpu", "engine.precision=bf16"]
    table, numbers = planned(capsys, file, *SIZES, *large, "index.factory=SQfp16", "refresh.precision=bfloat16")
    assert numbers["gpus"] <= 1024
    assert numbers["gpus"] == numbers["trainers"] + numbers["shards"] + numbers["workers"]
    assert numbers["shard_at_most_bytes"] <= 0.9 * 141e9
    assert f"index.num_shards={numbers['shards']}" in table


def test_all_gpus_train_and_encode(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With as many GPUs as trainers, each has a worker beside its trainer; the settings place exactly that."""
    few = ["plan.gpu=h100", "plan.gpus=4", "cluster.num_trainers=4", "plan.passages=1000000", "index.device=gpu"]
    table, numbers = planned(capsys, file, *SIZES, *few)
    assert (numbers["gpus"], numbers["trainers"], numbers["shards"], numbers["workers"]) == (4, 4, 4, 4)
    assert "each of 4 GPUs does a part of all" in table
    settings = load([file], [*SIZES, *few, *numbers["overrides"]]).settings
    placement = seat(settings.cluster, settings.refresh, settings.index, [Node(48, 4)])
    assert [one.gpus for one in placement.seats()] == [0.6, 0.2, 0.2]


def test_replicas_need_machines_of_their_own(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Three generations of 20 M x 128 in 16 bits are 15.36 GB, and fit one machine of 18 GB beside a trainer, a worker
    and a process of 2.5. With four replicas, a machine of N has 4 x 15.36 / N, and 3.24 for the others: N is 5."""
    wanted = ["plan.gpu=cpu", "plan.node_memory_gb=20", "plan.passages=20000000", "index.factory=SQfp16"]
    for replicas, nodes in (1, 1), (4, 5):
        table, numbers = planned(capsys, file, *wanted, f"index.replicas={replicas}")
        assert numbers["nodes"] == nodes, table
    assert "5 shard(s) x 4 replicas" in table
    few = ["plan.gpu=h100", "plan.passages=1000000", "index.device=gpu", "plan.gpus=8", "index.replicas=3"]
    table, numbers = planned(capsys, file, *SIZES, *few)
    assert (numbers["shards"], numbers["gpus"]) == (1, 1 + 3 + numbers["workers"])
    assert "serve on 3 GPU" in table


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("passages", "per_node"), [(10**6, 1), (10**7, 2), (10**8, 8), (10**9, 8)])
def test_what_is_planned_can_be_placed(
    file: str, capsys: pytest.CaptureFixture[str], device: str, replicas: int, passages: int, per_node: int
) -> None:
    """The settings that `plan` prints have room on the machines that it prints."""
    wanted = [*SIZES, "plan.gpu=h100", f"plan.gpus_per_node={per_node}", f"plan.passages={passages}"]
    wanted += [f"index.device={device}", f"index.replicas={replicas}", "index.factory=SQfp16"]
    _, numbers = planned(capsys, file, *wanted)
    settings = load([file], [*wanted, *numbers["overrides"]]).settings
    nodes = [Node(12 * per_node, per_node)] * numbers["nodes"]
    placement = seat(settings.cluster, settings.refresh, settings.index, nodes)
    assert placement.trainers.gpus > 0
    assert placement.workers.gpus > 0
    assert placement.shards.number == numbers["shards"] * replicas


def test_json_only(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--json", file, "plan.gpu=a10g", "plan.passages=5000"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["gpu"] == "a10g"


def test_the_store_says_how_much_there_is(file: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "runs" / "a" / "data" / "key" / "passages", 30)
    work, notes = work_of(load([file], []).settings, Path("runs/a"))
    assert work.passages == 30
    assert work.tokens == pytest.approx(store.tokens("retriever").lengths.mean())
    assert "the store" in notes[0]
    again, _ = work_of(load([file], ["plan.passages=7", "plan.tokens_per_passage=9"]).settings, Path("runs/a"))
    assert (again.passages, again.tokens) == (7, 9)


def test_the_synthetic_world_is_counted(file: str) -> None:
    work, notes = work_of(load([file], ["corpus.world.num_people=50"]).settings, Path("runs/a"))
    assert (work.passages, notes[0]) == (300, "passages: counted in the corpus")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["corpus.path=nowhere"], "how many passages? No prepared store, and corpus.path=nowhere"),
        (["plan.passages=9", "encoder.name=no/such"], "encoder.name=no/such: its config.json is not on this machine"),
        (
            ["plan.passages=9", "generator.kind=fusion", "generator.name=no/such"],
            "say how large it is: plan.generator=LAYERSxHIDDENxVOCABULARY",
        ),
        (["plan.gpu=h1000"], "plan.gpu=h1000: must be one of auto, h100"),
        (["plan.gpus=2000"], "plan.gpus=2000: must be 0 (as many as are needed) to 1024"),
        (["plan.encoder=12x768"], "plan.encoder=12x768: must be LAYERSxHIDDENxVOCABULARY"),
        (["plan.passages=20000000000"], "must be 0 (counted) to 10000000000"),
        (["plan.network_gbit_s=0"], "plan.network_gbit_s=0.0: must be above 0"),
        (["cluster.memory_margin=1"], "cluster.memory_margin=1.0: must be at least 0 and below 1"),
        (["cluster.check_fit=no"], "cluster.check_fit=no: must be one of refuse, warn, off"),
        (
            [*SIZES, "plan.passages=1000000000", "plan.gpus=8", "engine.precision=bf16", "index.device=gpu"],
            "8 GPUs (plan.gpus) are not enough: 1 train and",
        ),
    ],
)
def test_what_is_missing_is_asked_for_by_name(
    file: str, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = [] if any(text.startswith("plan.gpu=") for text in overrides) else ["plan.gpu=h100"]
    assert cli.main(["plan", file, *defaults, *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err


def test_a_probe_measures_this_machine() -> None:
    host = this_host(64, 16, seconds=0.08)
    assert host.cpus >= 1
    for rate in (host.product_flops, host.scan_flops, host.pair_bytes, host.copy_bytes):
        assert 1e8 < rate < 1e13


def test_gpus_are_told_apart() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3", 80 * GB) == "h100"
    assert known_gpu("NVIDIA A100-SXM4-80GB", 85 * GB) == "a100-80g"
    assert known_gpu("NVIDIA A100-PCIE-40GB", 42 * GB) == "a100-40g"
    assert known_gpu("Tesla T4", 16 * GB) == "t4"
    assert known_gpu("GeForce", 8 * GB) is None
    assert gpu_memory({"CPU": 8.0, "accelerator_type:H100": 1.0}) == 80 * GB
    assert gpu_memory({"CPU": 8.0}) == 0


# ---------------------------------------------------------------- before a launch


def refusal_of(settings: Settings, node: Node, passages: int = 10**6, nodes: int = 1) -> str:
    placement = seat(settings.cluster, settings.refresh, settings.index, [node] * nodes)
    with pytest.raises(ValueError) as caught:
        check_fit(settings, placement, passages)
    return str(caught.value)


def test_a_launch_that_does_not_fit_is_refused_with_the_plans_numbers(file: str) -> None:
    settings = load([file], []).settings
    one = Node(4, 0, memory_bytes=4 * GB)
    placement = seat(settings.cluster, settings.refresh, settings.index, [one])
    check_fit(settings, placement, 10_000)
    work, _ = work_of(settings, Path("runs/a"), 10**7, on_gpu=False)
    refused = refusal_of(settings, one, 10**7)
    assert refused.startswith("a does not fit: 1 x trainer of")
    assert f"2 x index shard of {(shard_bytes(work, 2).at_most + 0.25e9) / GB:.2f} GB" in refused
    assert f"1 x trainer of {trainer_bytes(work, 1, False)[0] / GB:.2f} GB" in refused
    assert "there are 4.00 GB, of which 10% stay free" in refused


def test_only_said_or_not_asked(file: str) -> None:
    said: list[str] = []
    for mode, times in (("warn", 1), ("off", 0)):
        settings = load([file], [f"cluster.check_fit={mode}"]).settings
        placement = seat(settings.cluster, settings.refresh, settings.index, [Node(4, 0, memory_bytes=1 * GB)])
        check_fit(settings, placement, 10**7, said.append)
        assert len(said) == times
        said.clear()


def test_unknown_memory_and_unknown_models_are_no_reason_to_refuse(file: str) -> None:
    settings = load([file], []).settings
    check_fit(settings, seat(settings.cluster, settings.refresh, settings.index, [Node(4, 0)]), 10**9)
    said: list[str] = []
    strange = replace(settings, encoder=replace(settings.encoder, name="no/such"))
    check_fit(strange, seat(settings.cluster, settings.refresh, settings.index, [Node(4, 0, 1.0)]), 10**9, said.append)
    assert "is not checked: encoder.name=no/such" in said[0]


def test_a_gpu_that_is_too_small(file: str) -> None:
    settings = load([file], [*SIZES, "index.device=gpu", "index.num_shards=2", "engine.precision=bf16"]).settings
    fine = Node(32, 4, 500 * GB, 80 * GB)
    check_fit(settings, seat(settings.cluster, settings.refresh, settings.index, [fine]), 10**6)
    small = replace(fine, gpu_memory_bytes=16 * GB)
    assert "1 x index shard of" in refusal_of(settings, small, 10**7)
    shares = replace(settings.cluster, trainer_gpus=0.4, refresh_gpus=0.2, shard_gpus=0.2)
    shared = replace(settings, cluster=shares)
    refused = refusal_of(shared, replace(fine, gpus=1), 10**7)  # all on one GPU: their sum counts
    assert "2 x trainer of" in refused or "1 x trainer of" in refused
    assert " x index shard of" in refused
    assert " x refresh worker of" in refused


def test_a_shared_gpu_holds_a_trainer_and_a_worker(file: str) -> None:
    """Each has room alone; where they have not together, the refusal names the way out, which fits."""
    settings = load([file], [*SIZES, "engine.precision=bf16", "refresh.batch_tokens=131072"]).settings
    node = Node(8, 1, 500 * GB, 24 * GB)
    placement = seat(settings.cluster, settings.refresh, settings.index, [node])
    assert (placement.trainers.gpus, placement.workers.gpus) == (0.6, 0.4)
    check_fit(settings, placement, 10**6)
    refused = refusal_of(settings, replace(node, gpu_memory_bytes=18 * GB))
    assert "1 x refresh worker of" in refused
    assert "1 x trainer of" in refused
    assert "cluster.refresh_gpus=0 encodes on CPU" in refused
    alone = replace(settings, cluster=replace(settings.cluster, refresh_gpus=0.0))
    placement = seat(alone.cluster, alone.refresh, alone.index, [replace(node, gpu_memory_bytes=18 * GB)])
    check_fit(alone, placement, 10**6, lambda _: None)


@pytest.mark.parametrize("mode", ["refuse", "off"])
def test_refreshes_without_a_gpu_are_said_with_their_time(file: str, mode: str) -> None:
    """21 M passages x 26.3 GFLOP, at 0.6 x 32 GFLOP/s and thread: 333 days with one thread, 47.6 with seven."""
    wanted = [*SIZES, "cluster.trainer_gpus=1", "encoder.max_passage_tokens=150", f"cluster.check_fit={mode}"]
    settings = load([file], wanted).settings
    said: list[str] = []
    for cpus, expected in (
        (2, "1 threads): a refresh of 21,015,324 passages takes about 333 days"),
        (15, "47.6 days."),
    ):
        placement = seat(settings.cluster, settings.refresh, settings.index, [Node(cpus, 1)])
        check_fit(settings, placement, 21_015_324, said.append)
        assert expected in said[-1]
    assert len(said) == 2
    assert "cluster.trainer_gpus=0.6 and cluster.refresh_gpus=0.2 let a trainer and a worker share a GPU" in said[0]
    check_fit(settings, seat(settings.cluster, settings.refresh, settings.index, [Node(8, 2)]), 10**6, said.append)
    settings = load([file], SIZES).settings
    check_fit(settings, seat(settings.cluster, settings.refresh, settings.index, [Node(8, 0)]), 10**6, said.append)
    assert len(said) == 2  # with a GPU for each, and where nobody has one, there is nothing to say


def test_the_fullest_machine_counts(file: str) -> None:
    """Shards of 15.36 GB in all are spread; the machine of the trainer holds one of them, too."""
    settings = load([file], ["index.factory=SQfp16", "index.num_shards=2"]).settings
    small = [Node(8, 0, memory_bytes=20 * GB), Node(8, 0, memory_bytes=8 * GB)]
    placement = seat(settings.cluster, settings.refresh, settings.index, small)
    with pytest.raises(ValueError, match=r"1 x index shard of 7\.93 GB.* there are 8\.00 GB"):
        check_fit(settings, placement, 20 * 10**6)


def test_machines_share_the_load(file: str) -> None:
    """Four shards on four machines need less of each than on one."""
    settings = load([file], ["index.num_shards=4"]).settings
    node = Node(8, 0, memory_bytes=10 * GB)
    refusal_of(settings, node, 6 * 10**6)
    check_fit(settings, seat(settings.cluster, settings.refresh, settings.index, [node] * 4), 6 * 10**6)


def test_every_replica_holds_a_whole_part(file: str) -> None:
    """20 M vectors of 128 numbers in 16 bits, three generations of them: 15.36 GB, on two shards 7.68 each, and 0.25
    for the process. Four replicas of both hold 63.44 GB, not 17.36."""
    settings = load([file], ["index.factory=SQfp16", "index.num_shards=2", "index.replicas=4"]).settings
    refused = refusal_of(settings, Node(16, 0, memory_bytes=60 * GB), 20 * 10**6)
    assert "8 x index shard of 7.93 GB" in refused


def test_the_command_refuses_before_anything_starts(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["corpus.world.num_people=12", "corpus.world.num_values=20", "encoder.tokenizer.vocabulary=300"]
    assert cli.main(["train", file, *small, "cluster.memory_margin=0.9999"]) == 2
    assert "tandem: a does not fit: 1 x trainer of" in capsys.readouterr().err
    assert not Path("runs/a/events.jsonl").exists()
    assert not Path("runs/a/index").exists()
