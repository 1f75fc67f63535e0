"""Lists the abilities of GPUs and of the hosts around them, and measures the processors of this machine.

Peak numbers come from the vendors and are dense (those that datasheets mark "with sparsity" are twice as large).
`share` is the part of them that a program reaches, from published measurements of training if there are any.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from indexing.allowance import usable_cpus, usable_memory

GB = 1e9
SCAN_K = 36  # Number of hits of a probing search: 20 and the spare ones


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or all processors of a machine together."""

    name: str
    memory_bytes: float  # bytes that programs may use, of one device
    flops: float  # peak operations per second, in bf16 if the device multiplies in it, otherwise in fp32
    fp32_flops: float  # peak operations per second without tensor cores, which torch uses for fp32 by default
    bandwidth: float  # peak bytes per second of its memory
    share: float  # Share of `flops` that training and encoding reach
    ray_names: tuple[str, ...] = ()  # Ray's names for it: accelerator_type:...


# share: MosaicML llm-foundry, scripts/train/benchmarking/README.md, table "H100 80GB BF16": 35 to 46% of the peak for
# models of 0.76 to 7 B parameters at 1,024 to 4,096 tokens; 0.35 is the low end, since the models here are smaller. The
# same file has A100s between 40 and 60%. No such table is known for the smaller cards: they get the H100's.
GPUS: dict[str, Device] = {
    # NVIDIA H100 Tensor Core GPU datasheet (SXM): 80 GB, 989 TFLOP/s bf16, 67 fp32, 3.35 TB/s
    "h100": Device(
        name="h100",
        memory_bytes=80 * GB,
        flops=989e12,
        fp32_flops=67e12,
        bandwidth=3.35e12,
        share=0.35,
        ray_names=("H100",),
    ),
    # NVIDIA H200 Tensor Core GPU datasheet (SXM): 141 GB, 989 TFLOP/s, 67 fp32, 4.8 TB/s
    "h200": Device(
        name="h200",
        memory_bytes=141 * GB,
        flops=989e12,
        fp32_flops=67e12,
        bandwidth=4.8e12,
        share=0.35,
        ray_names=("H200",),
    ),
    # NVIDIA A100 Tensor Core GPU datasheet (SXM): 312 TFLOP/s, 19.5 fp32; 80 GB with 2,039 GB/s, 40 GB with 1,555 GB/s
    "a100-80g": Device(
        name="a100-80g",
        memory_bytes=80 * GB,
        flops=312e12,
        fp32_flops=19.5e12,
        bandwidth=2.039e12,
        share=0.40,
        ray_names=("A100-80G",),
    ),
    "a100-40g": Device(
        name="a100-40g",
        memory_bytes=40 * GB,
        flops=312e12,
        fp32_flops=19.5e12,
        bandwidth=1.555e12,
        share=0.40,
        ray_names=("A100", "A100-40G"),
    ),
    # NVIDIA L40S datasheet: 48 GB, 362 TFLOP/s (733 with sparsity), 91.6 fp32, 864 GB/s
    "l40s": Device(
        name="l40s",
        memory_bytes=48 * GB,
        flops=362e12,
        fp32_flops=91.6e12,
        bandwidth=0.864e12,
        share=0.35,
        ray_names=("L40S",),
    ),
    # NVIDIA A10G product brief (AWS G5): 24 GB, 70 TFLOP/s (140 with sparsity), 35 fp32, 600 GB/s
    "a10g": Device(
        name="a10g",
        memory_bytes=24 * GB,
        flops=70e12,
        fp32_flops=35e12,
        bandwidth=0.6e12,
        share=0.35,
        ray_names=("A10G",),
    ),
    # NVIDIA T4 datasheet: 16 GB, 320 GB/s. Its 65 TFLOP/s are fp16, in which nothing is trained here, and it has no
    # bf16:
    # the 8.1 TFLOP/s of fp32 count
    "t4": Device(
        name="t4",
        memory_bytes=16 * GB,
        flops=8.1e12,
        fp32_flops=8.1e12,
        bandwidth=0.32e12,
        share=0.35,
        ray_names=("T4",),
    ),
}
# Share of peak bandwidth in long scans: BabelStream (Deakin et al. 2018) reaches 0.8 to 0.9 on GPUs
BANDWIDTH_SHARE = 0.8
# Share of the matrix product's rate that encoding reaches: benchmarks/results/encode.md, 48 to 53 GFLOP/s
CPU_SHARE = 0.6

# A machine around GPUs, one processor thread: 2.5 GHz x 16 fp32 multiply-adds a cycle and core (AVX2), two threads
# a core, 80% of it. Bandwidth of one machine: two sockets of eight DDR4-3200 channels have 410 GB/s; half of it.
# One thread alone reads about 10 GB/s and copies 5.
HOST_FLOPS_PER_CPU = 0.8 * 2.5e9 * 32 / 2
HOST_BANDWIDTH, THREAD_BANDWIDTH = 2.0e11, 1.0e10


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine without its GPUs."""

    cpus: int
    memory_bytes: float
    product_flops: float  # operations per second and processor, fp32, of large matrix products
    scan_flops: float  # operations per second and processor, of a batch of queries with a long array of vectors
    pair_bytes: float  # bytes per second and processor, read by inner products of one query with many vectors
    copy_bytes: float  # bytes per second and processor, written by a copy
    bandwidth: float  # bytes per second that all processors together may read

    @property
    def flops(self) -> float:
        """Return the operations per second of matrix products on all processors."""
        return self.cpus * self.product_flops


def planned_host(cpus: int, memory_bytes: float) -> Host:
    """Return a machine that is not here, with the constants above."""
    return Host(
        cpus=cpus,
        memory_bytes=memory_bytes,
        product_flops=HOST_FLOPS_PER_CPU,
        scan_flops=HOST_FLOPS_PER_CPU / 2,
        pair_bytes=THREAD_BANDWIDTH,
        copy_bytes=THREAD_BANDWIDTH / 2,
        bandwidth=HOST_BANDWIDTH,
    )


def this_host(dim: int, batch: int, seconds: float = 0.4, clock: Callable[[], float] = time.process_time) -> Host:
    """Return this machine, measured for about `seconds` of `clock`: the rates of one thread, with vectors of `dim`
    numbers and `batch` queries at a time. The default clock counts the seconds of this process alone, since other work
    will be over when the plan is carried out."""
    from indexing.dense.faiss_library import load_faiss, tune_blas

    faiss = load_faiss()
    each = seconds / 4
    chance = np.random.default_rng(0)
    rows = max(1024, int(64 * 2**20 / 4 / dim))  # 64 MiB: more than a cache holds
    vectors = chance.standard_normal((rows, dim), np.float32)
    queries = chance.standard_normal((max(batch, 1024), dim), np.float32)
    target = np.empty_like(vectors)
    many, few = faiss.IndexFlatIP(dim), faiss.IndexFlatIP(dim)
    many.add(vectors)
    few.add(vectors[:1024])
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        tune_blas(dim)
        scan = 2.0 * batch * rows * dim / median_seconds(lambda: many.search(queries[:batch], SCAN_K), each, clock)
        pair = vectors.nbytes / median_seconds(lambda: many.search(queries[:1], SCAN_K), each, clock)
        product = 2.0 * len(queries) * 1024 * dim / median_seconds(lambda: few.search(queries, 1), each, clock)
        copy = vectors.nbytes / median_seconds(lambda: np.copyto(target, vectors), each, clock)
    finally:
        faiss.omp_set_num_threads(threads)
    cpus = usable_cpus()
    return Host(
        cpus=cpus,
        memory_bytes=usable_memory()[0],
        product_flops=product,
        scan_flops=scan,
        pair_bytes=pair,
        copy_bytes=copy,
        bandwidth=cpus * 2 * max(pair, copy),
    )


def median_seconds(work: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Return the median of the times that `work` takes, repeated for about `seconds` (three times at least)."""
    work()
    times: list[float] = []
    end = clock() + seconds
    while len(times) < 3 or clock() < end:
        begin = clock()
        work()
        times.append(clock() - begin)
    return float(np.median(times))


def gpu_at_hand() -> str:
    """Return the name in `GPUS` of this machine's first GPU; cpu without one. Raises ValueError for one that is not
    known."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name(0)
    found = known_gpu(name, torch.cuda.get_device_properties(0).total_memory)
    if found is None:
        raise ValueError(f"plan.gpu is empty and this machine has a {name}: set it to one of {', '.join(GPUS)}, cpu")
    return found


def known_gpu(name: str, memory_bytes: float) -> str | None:
    """Return the entry of `GPUS` for a CUDA device's name; the memory distinguishes A100s."""
    plain = name.lower().replace("nvidia", "").replace("tesla", "").strip()
    if "a100" in plain:
        return "a100-80g" if memory_bytes > 60 * GB else "a100-40g"
    return next((known for known in ("h100", "h200", "l40s", "a10g", "t4") if known in plain.replace("-", " ")), None)
