"""Tests costs and the smallest placement: by hand, never less for more, and for the smallest and largest machines."""

import re
from dataclasses import replace

import pytest

from cluster.config.settings import ClusterConfig, PlanConfig, RefreshConfig
from cluster.planning.hardware import GB, GPUS, Host, planned_host
from cluster.planning.sizing import (
    Counts,
    Machines,
    Work,
    costs,
    encode_seconds,
    search_seconds,
    shard_bytes,
    step_seconds,
    trainer_bytes,
)
from cluster.planning.smallest import smallest
from indexing.dense.kinds import parse
from indexing.indexing_settings import IndexConfig
from training.measuring.sizes import encoder_size, generator_size
from training.training_settings import EncoderConfig, GeneratorConfig

LAPTOP = Host(
    cpus=4, memory_bytes=16 * GB, product_flops=5e10, scan_flops=2e10, pair_bytes=8e9, copy_bytes=5e9, bandwidth=3e10
)
CPU = Machines(device=None, host=LAPTOP, gpus_per_node=0, limit=1024, network=1.25e8, margin=0.1)
H100 = Machines(
    device=GPUS["h100"], host=planned_host(96, 1024 * GB), gpus_per_node=8, limit=1024, network=1.25e10, margin=0.1
)


def work(**changes: object) -> Work:
    """BERT-base and T5-base, 20 passages a question."""
    encoder = encoder_size(EncoderConfig(), "12x768x30522")
    reader = generator_size(GeneratorConfig(kind="fusion"), 0, "24x768x32128")
    base = Work(
        passages=10**6,
        tokens=100.0,
        dim=768,
        encoder=encoder,
        reader=reader,
        trained=encoder.parameters + reader.parameters,
        frozen=0,
        published=encoder.parameters,
        encodes_passages=True,
        fused=True,
        uses_index=True,
        factory="Flat",
        halves=False,
        replicas=1,
        index_on_gpu=True,
        nprobe=16,
        training_sample=100_000,
        batch=8,
        accumulation=1,
        trainers=1,
        k=20,
        question_tokens=32,
        prompt_tokens=132.0,
        answer_tokens=16,
        checkpointing=(True, True),
        cached_passages=0,
        loss_chunk=512,
        zero_stage=2,
        offload=False,
        precision="bf16",
        published_bytes=2,
        every_steps=500,
        steps=10_000,
        step_seconds=0.0,
        batch_tokens=131072,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def test_a_thousand_passages_on_a_laptop_need_no_gpu() -> None:
    tower, reader = encoder_size(EncoderConfig()), generator_size(GeneratorConfig(), 3000)
    small = work(
        passages=1000,
        dim=tower.dim,
        encoder=tower,
        reader=reader,
        trained=2_000_000,
        published=tower.parameters,
        index_on_gpu=False,
        precision="fp32",
        batch_tokens=4096,
    )
    counts = smallest(small, CPU)
    assert counts == Counts(trainers=1, shards=1, workers=1, nodes=1, gpus=0)
    assert counts.layout(CPU, False) == "machine 1"
    assert costs(small, CPU, counts).refresh_s < 60


def test_a_billion_passages_on_1024_gpus() -> None:
    """At 768 halves a passage 1.5 TB; a GPU holds three generations of its part."""
    large = work(passages=10**9, factory="SQfp16")
    counts = smallest(large, H100)
    assert counts.gpus == counts.trainers + counts.shards + counts.workers <= 1024
    assert counts.nodes == -(-counts.gpus // 8)
    per_shard = shard_bytes(large, counts.shards).at_most
    assert per_shard == pytest.approx(3 * 1536e9 / counts.shards + 256 * 2**20, rel=1e-3)
    assert per_shard <= 72e9 < shard_bytes(large, counts.shards - 2).at_most
    found = costs(large, H100, counts)
    assert found.vector_bytes_per_refresh == 10**9 * 768 * 4
    assert found.encode_s == pytest.approx(10**9 * large.encoder.flops(100) / (counts.workers * 989e12 * 0.35))


def test_more_passages_never_need_less() -> None:
    for index_on_gpu, factory in ((True, "SQfp16"), (False, "Flat"), (False, "IVF4096,SQ8")):
        before = Counts(trainers=0, shards=0, workers=0, nodes=0, gpus=0)
        for passages in (10**3, 10**5, 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8):
            counts = smallest(work(passages=passages, factory=factory, index_on_gpu=index_on_gpu), H100)
            assert (counts.gpus, counts.nodes, counts.shards) >= (before.gpus, before.nodes, 0)
            assert counts.shards >= before.shards
            before = counts
    workstation = replace(CPU, host=replace(LAPTOP, memory_bytes=64 * GB))
    nodes = [smallest(work(passages=n, index_on_gpu=False), workstation).nodes for n in (10**3, 10**6, 10**7)]
    assert 1 == nodes[0] <= nodes[1] < nodes[2]


def test_more_gpus_never_make_a_refresh_slower() -> None:
    large = work(passages=10**8, factory="SQfp16")
    times = [
        costs(large, replace(H100, limit=n), smallest(large, replace(H100, limit=n))).refresh_s for n in (16, 64, 512)
    ]
    assert times == sorted(times, reverse=True)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"8 GPUs \(plan\.gpus\) are not enough: 1 train and \d+ serve the index"):
        smallest(work(passages=10**9), replace(H100, limit=8))
    huge = work(trained=70 * 10**9, zero_stage=0)
    with pytest.raises(
        ValueError, match=r"a trainer among 1024 needs 1\d{3}\.\d GB, the memory of one GPU has 72\.0 GB"
    ):
        smallest(huge, H100)
    fits = smallest(replace(huge, zero_stage=3), H100)
    assert trainer_bytes(replace(huge, zero_stage=3), fits.trainers, True)[0] <= 72e9
    assert trainer_bytes(replace(huge, zero_stage=3), fits.trainers - 1, True)[0] > 72e9
    with pytest.raises(ValueError, match=r"the memory of one machine has 14\.4 GB"):
        smallest(work(trained=10**10, precision="fp32"), CPU)
    with pytest.raises(ValueError, match=re.escape("cluster.num_trainers=16")):
        smallest(work(trainers=16), replace(H100, limit=8))


def test_one_gpu_does_it_all_where_it_can() -> None:
    counts = smallest(work(passages=1000), H100)
    assert counts == Counts(trainers=1, shards=1, workers=1, nodes=1, gpus=1, shared=True)


def test_workers_keep_up_with_publishing() -> None:
    """Encoding takes at most half of the time between two publishes, with one worker less it would take more."""
    wide = work(passages=3 * 10**7, factory="SQfp16")
    counts = smallest(wide, H100)
    half = 0.5 * 500 * step_seconds(wide, H100, counts.trainers)
    assert encode_seconds(wide, H100, counts.workers) <= half < encode_seconds(wide, H100, counts.workers - 1)


def test_staleness_by_hand() -> None:
    """Steps of a second, published every 500: a commit is as stale as its refresh took; before the next one comes, by
    the time between two publishes more."""
    counts = Counts(trainers=1, shards=8, workers=4, nodes=2, gpus=13)
    found = costs(work(step_seconds=1.0, factory="SQfp16"), H100, counts)
    assert found.staleness_at_commit_steps == pytest.approx(found.refresh_s)
    assert found.staleness_at_most_steps == pytest.approx(found.refresh_s + 500)
    assert found.hours_per_run == pytest.approx(13 * (10_000 + found.refresh_s) / 3600)
    assert found.query_bytes_per_step == 8 * 8 * 768 * 4


def test_search_by_hand() -> None:
    counts = Counts(trainers=1, shards=2, workers=1, nodes=1, gpus=0)
    host = replace(LAPTOP, bandwidth=1e12)
    flat = work(index_on_gpu=False)
    rows = 500_000
    # two shards of one thread each: 4 processors, one for the trainer, one for the worker
    assert search_seconds(flat, replace(CPU, host=host), counts) == pytest.approx(2 * 8 * rows * 768 / 2e10)
    lists = work(index_on_gpu=False, factory="IVF1000,Flat")
    coarse, read = parse("IVF1000,Flat").search_work(rows, dim=768, batch=8, nprobe=16)[1:]
    assert read == 8 * rows * 16 / 1000 * 3072
    assert search_seconds(lists, replace(CPU, host=host), counts) == pytest.approx(coarse / 5e10 + read / 8e9)


def test_search_sets_the_pace_where_many_trainers_ask() -> None:
    counts = Counts(trainers=16, shards=8, workers=4, nodes=4, gpus=28)
    found = costs(work(factory="SQfp16", passages=10**8, step_seconds=0.001), H100, counts)
    busy = 16 * search_seconds(work(factory="SQfp16", passages=10**8), H100, counts)
    assert found.search_share_of_step == pytest.approx(busy / 0.001)
    assert found.step_s == pytest.approx(busy)
    assert costs(work(step_seconds=1.0), H100, counts).step_s == 1.0


def test_the_overrides_are_accepted_by_the_placement() -> None:
    """What a plan says to launch with seats everybody on the machines that it names."""
    from cluster.planning.placement import Node
    from cluster.planning.placement import plan as seat

    for passages, limit in ((1000, 1024), (10**7, 16), (10**8, 1024)):
        machines = replace(H100, limit=limit)
        counts = smallest(work(passages=passages, factory="SQfp16"), machines)
        if counts.shared:
            shares = {"trainer_gpus": 0.6, "refresh_gpus": 0.2, "shard_gpus": 0.2}
        else:
            shares = {"refresh_gpus": 1.0}
        seats = seat(
            replace(ClusterConfig(num_trainers=counts.trainers), **shares),
            RefreshConfig(num_workers=counts.workers),
            IndexConfig(device="gpu", num_shards=counts.shards),
            [Node(96, 8)] * counts.nodes,
        )
        assert sum(one.number * one.gpus for one in seats.seats()) == pytest.approx(counts.gpus)


def test_the_section_documents_what_the_table_knows() -> None:
    from cluster.config.setting_names import DECLARED

    assert {*GPUS, "cpu", "auto"} == set(DECLARED["plan.gpu"][1].choices)
    assert PlanConfig().gpu == "auto"
