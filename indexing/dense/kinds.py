"""Parses and checks factory strings, which name the kinds of index, and counts what each kind costs, without FAISS.

Flat | SQfp16                           exhaustive: every vector as float32, as float16
SQ8 | PQm | PQmxb                       every vector compressed: one byte a number; m parts of b bits (8)
IVFn,Flat | SQfp16 | SQ8 | PQm[xb]      n lists, of which index.nprobe are visited
OPQm,[IVFn,]PQm[xb]                     the same after a rotation that product quantisation likes (Ge et al. 2013)
HNSWn[,Flat | SQfp16 | SQ8]             a graph with n links a vector (Malkov and Yashunin 2018); CPU only
"""

import re
from dataclasses import dataclass

from indexing.declare import refuse
from indexing.indexing_settings import FACTORIES

EXHAUSTIVE = ("Flat", "SQfp16")  # searched exactly
COMPRESSED = ("SQ8", "PQ")
# Number of parts of a PQ code that FAISS's GPU kernels take
GPU_PARTS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
MAX_LINKS = 512
PQ_BITS = (4, 12)
FLOAT, ID = 4, 8  # bytes
# Number of FAISS's k-means rounds for the centroids of an IVF, and of vectors per centroid at most; likewise for PQ
KMEANS_ROUNDS, KMEANS_POINTS = 10, 256
PQ_ROUNDS, PQ_POINTS = 25, 256
# Number of distances per insertion: FAISS's efConstruction of 40, times about 16 neighbours each
HNSW_VISITED = 40 * 16
# Number of times that a build passes vectors through memory, in units of a copy (compared with benchmarks/scale.py):
# their norms in float64; kinds that are not exhaustive check them again, assign and add them
EXHAUSTIVE_PASSES, OTHER_PASSES = 2, 4

_PATTERN = re.compile(
    r"(?:OPQ(?P<opq>[1-9]\d*),)?"
    r"(?:IVF(?P<lists>[1-9]\d*),|HNSW(?P<links>[1-9]\d*)(?:,|$))?"
    r"(?P<codec>Flat|SQfp16|SQ8|PQ(?P<parts>[1-9]\d*)(?:x(?P<bits>[1-9]\d*))?)?"
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The parts of a factory string. 0 stands for an absent part."""

    factory: str
    codec: str  # Flat | SQfp16 | SQ8 | PQ: the code of a vector
    lists: int = 0  # Number of IVF lists
    links: int = 0  # Number of HNSW links per vector
    parts: int = 0  # Number of parts of a PQ code
    bits: int = 0  # Number of bits of each part
    rotated: bool = False  # True after OPQ

    @property
    def exhaustive(self) -> bool:
        """Return True if every vector is kept and visited, so that searches are exact."""
        return self.factory in EXHAUSTIVE

    @property
    def compressed(self) -> bool:
        """Return True if a stored vector is only near the one that was added."""
        return self.codec in COMPRESSED

    @property
    def in_order(self) -> bool:
        """Return True if whole vectors are kept in the order of their rows."""
        return not self.compressed and not self.lists

    @property
    def float16(self) -> bool:
        """Return True if vectors are kept as float16."""
        return self.codec == "SQfp16"

    @property
    def cuttable(self) -> bool:
        """Return True if rows of an index can be taken out of it with their codes as they are."""
        return not self.links

    @property
    def joinable(self) -> bool:
        """Return True if codes of indexes that were trained apart can be decoded and joined."""
        return self.codec != "PQ"

    @property
    def sampled(self) -> bool:
        """Return True if lists or codebooks are trained on a sample of the vectors."""
        return self.lists > 0 or self.parts > 0

    @property
    def training_vectors(self) -> int:
        """Return the least number of vectors that the kind is trained on."""
        return max(self.lists, 2**self.bits if self.parts else 0, 1 if self.codec == "SQ8" else 0)

    def code_bytes(self, dim: int) -> int:
        """Return the bytes of one stored vector."""
        match self.codec:
            case "Flat":
                return 4 * dim
            case "SQfp16":
                return 2 * dim
            case "SQ8":
                return dim
            case _:
                return (self.parts * self.bits + 7) // 8

    @property
    def id_bytes(self) -> int:
        """Return the bytes of a vector's id in a list."""
        return ID if self.lists else 0

    @property
    def link_bytes(self) -> float:
        """Return the bytes of a vector's links, in the mean: 2 * links neighbours on the lowest level, links on each
        level above, which 1 / links of the vectors reach; an offset and a level in 12 bytes (FAISS, impl/HNSW.h)."""
        return FLOAT * (2 * self.links + self.links / (self.links - 1)) + 12 if self.links else 0.0

    def fixed_bytes(self, dim: int) -> int:
        """Return the bytes of centroids, codebooks and rotation."""
        return FLOAT * dim * (self.lists + (2**self.bits if self.parts else 0) + (dim if self.rotated else 0))

    def build_work(self, num_vectors: int, dim: int, training_sample: int) -> tuple[float, float]:
        """Return the floating-point operations of matrix products, and the bytes copied, from vectors to an index.

        An IVF trains its centroids by k-means and assigns every vector; a product quantizer trains its codewords and
        encodes; a graph compares each new vector with the candidates of its search.
        """
        sample = min(training_sample, num_vectors)
        flops = 0.0
        if self.lists:
            flops += 2.0 * dim * self.lists * (KMEANS_ROUNDS * min(sample, KMEANS_POINTS * self.lists) + num_vectors)
        if self.parts:
            points = min(sample, PQ_POINTS * 2**self.bits)
            flops += 2.0 * dim * 2**self.bits * (PQ_ROUNDS * points + num_vectors)
        if self.links:
            flops += 2.0 * dim * HNSW_VISITED * num_vectors
        passes = EXHAUSTIVE_PASSES if self.exhaustive else OTHER_PASSES
        return flops, passes * num_vectors * dim * float(FLOAT)

    def search_work(
        self, num_vectors: int, *, dim: int, batch: int, nprobe: int, on_gpu: bool = False
    ) -> tuple[float, float, float]:
        """Return the cost of `batch` queries: operations of products of all queries with all vectors; operations of
        coarse products; bytes read by one query after another.

        Flat, and SQfp16 on a GPU, multiply the batch with all vectors; other codes are decoded for each query; an IVF
        reads `nprobe` of its lists for each query; a graph visits about `links` times as many vectors as it answers.
        """
        if self.factory == "Flat" or (on_gpu and self.exhaustive):
            return 2.0 * batch * num_vectors * dim, 0.0, 0.0
        # decoding takes as long as the saved bytes would
        read = FLOAT * (self.parts or dim)
        if self.lists:
            visited = num_vectors * min(nprobe, self.lists) / self.lists
            return 0.0, 2.0 * batch * self.lists * dim, batch * visited * read
        if self.links:
            return 0.0, 0.0, batch * min(num_vectors, HNSW_VISITED) * float(dim * FLOAT)
        return 0.0, 0.0, batch * num_vectors * float(read)


def parse(factory: str) -> Kind:
    """Return the kind that `factory` names. Raises ValueError for any other string."""
    found = _PATTERN.fullmatch(factory)
    if found is None or not factory:
        raise refuse("index.factory", factory, f"must be one of {FACTORIES}")
    opq, lists, links, parts, bits = (int(found[name] or 0) for name in ("opq", "lists", "links", "parts", "bits"))
    codec = "PQ" if parts else found["codec"] or ("Flat" if links else "")
    if not codec or factory.endswith(",") or (links and codec == "PQ") or (opq and codec != "PQ"):
        raise refuse("index.factory", factory, f"must be one of {FACTORIES}")
    if parts and not PQ_BITS[0] <= (bits or 8) <= PQ_BITS[1]:
        raise refuse("index.factory", factory, f"must have {PQ_BITS[0]} to {PQ_BITS[1]} bits a part")
    if opq and opq != parts:
        allowed = "must have the same number of parts for OPQ and PQ, like OPQ16,IVF1024,PQ16"
        raise refuse("index.factory", factory, allowed)
    if links > MAX_LINKS or links == 1:
        raise refuse("index.factory", factory, f"must have 2 to {MAX_LINKS} links")
    return Kind(
        factory=factory,
        codec=codec,
        lists=lists,
        links=links,
        parts=parts,
        bits=(bits or 8) if parts else 0,
        rotated=bool(opq),
    )


def check_kind(kind: Kind, device: str, *, num_vectors: int, training_sample: int, rescore_candidates: int) -> None:
    """Raise ValueError if `num_vectors` (of the smallest shard) or other settings do not fit the kind."""
    factory = kind.factory
    if device == "gpu":
        check_gpu_kind(kind)
    if kind.lists > num_vectors:
        allowed = f"must have 1 to {num_vectors} lists: a shard holds {num_vectors} vectors"
        raise refuse("index.factory", factory, allowed)
    needed = kind.training_vectors
    if needed > num_vectors:
        allowed = (
            f"must train on at most {num_vectors} vectors, those of a shard, but needs {needed} (2 to the power of"
        )
        raise refuse("index.factory", factory, f"{allowed} its bits): take PQ{kind.parts}x4, fewer shards, or SQ8")
    if needed > training_sample:
        raise refuse(
            "index.training_sample", training_sample, f"must be at least {needed} with index.factory={factory}"
        )
    if rescore_candidates and not kind.compressed:
        allowed = f"must be 0 with index.factory={factory}, whose scores come from whole vectors already"
        raise refuse("index.rescore_candidates", rescore_candidates, allowed)


def check_products(products: str, kind: Kind, device: str) -> None:
    """Raise ValueError for products that no search of the kind uses."""
    if products != "float32" and not (kind.exhaustive and device == "cpu"):
        allowed = f"must be float32 with index.factory={kind.factory} on {device}: it serves {' and '.join(EXHAUSTIVE)}"
        raise refuse("index.products", products, f"{allowed} on cpu")


def check_dim(kind: Kind, dim: int) -> None:
    """Raise ValueError if vectors of `dim` numbers cannot be cut into the kind's parts."""
    if kind.parts and dim % kind.parts:
        fitting = [parts for parts in range(1, dim + 1) if dim % parts == 0]
        near = sorted(sorted(fitting, key=lambda parts: abs(parts - kind.parts))[:3])
        allowed = f"must cut vectors of {dim} numbers into equal parts: {', '.join(map(str, near))}, not {kind.parts}"
        raise refuse("index.factory", kind.factory, allowed)


def check_gpu_kind(kind: Kind) -> None:
    """Raise ValueError for a kind that FAISS has for CPU only."""
    if kind.links:
        raise refuse("index.factory", kind.factory, "must be without HNSW with index.device=gpu")
    if not kind.lists and not kind.exhaustive:
        allowed = "must be Flat, SQfp16 or IVFn,... with index.device=gpu"
        raise refuse("index.factory", kind.factory, f"{allowed} (like IVF1024,{kind.codec}{kind.parts or ''})")
    if kind.parts and (kind.bits != 8 or kind.parts not in GPU_PARTS):
        allowed = ", ".join(map(str, GPU_PARTS))
        raise refuse("index.factory", kind.factory, f"must have 8 bits and {allowed} parts with index.device=gpu")
