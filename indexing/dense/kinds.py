"""The kinds of index that one factory string may name, read and checked without FAISS.

Flat | SQfp16                           exhaustive: every vector as float32, as float16
SQ8 | PQm | PQmxb                       every vector compressed: one byte a number; m parts of b bits (8)
IVFn,Flat | SQfp16 | SQ8 | PQm[xb]      n lists, of which index.nprobe are visited
OPQm,[IVFn,]PQm[xb]                     the same after a rotation that product quantisation likes (Ge et al. 2013)
HNSWn[,Flat | SQfp16 | SQ8]             a graph with n links a vector (Malkov and Yashunin 2018); CPU only
"""

import re
from dataclasses import dataclass

ALLOWED = "Flat, SQfp16, SQ8, PQm, IVFn,Flat|SQfp16|SQ8|PQm, HNSWn[,SQfp16|SQ8], and OPQm, before PQm or IVFn,PQm"
EXHAUSTIVE = ("Flat", "SQfp16")  # as a whole: searched exactly
COMPRESSED = ("SQ8", "PQ")
PRODUCTS = ("float32", "bfloat16")  # that candidates of an exhaustive kind are found by
GPU_PARTS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # of a PQ code in FAISS's GPU kernels
MAX_LINKS = 512
PQ_BITS = (4, 12)

_PATTERN = re.compile(
    r"(?:OPQ(?P<opq>[1-9]\d*),)?"
    r"(?:IVF(?P<lists>[1-9]\d*),|HNSW(?P<links>[1-9]\d*)(?:,|$))?"
    r"(?P<codec>Flat|SQfp16|SQ8|PQ(?P<parts>[1-9]\d*)(?:x(?P<bits>[1-9]\d*))?)?"
)


@dataclass(frozen=True)
class Kind:
    """What a factory string says. 0: there is none of it."""

    factory: str
    codec: str  # Flat | SQfp16 | SQ8 | PQ: how a vector is kept
    lists: int = 0  # of IVF
    links: int = 0  # of HNSW
    parts: int = 0  # of a PQ code
    bits: int = 0  # of each part
    rotated: bool = False  # by OPQ

    @property
    def exhaustive(self) -> bool:
        """Whether every vector is kept and visited: searched exactly."""
        return self.factory in EXHAUSTIVE

    @property
    def compressed(self) -> bool:
        """Whether a stored vector is no more than near the one that was added."""
        return self.codec in COMPRESSED

    @property
    def training_vectors(self) -> int:
        """How many vectors the kind is trained on at least."""
        return max(self.lists, 2**self.bits if self.parts else 0, 1 if self.codec == "SQ8" else 0)

    def code_bytes(self, dim: int) -> int:
        """Bytes of one stored vector."""
        match self.codec:
            case "Flat":
                return 4 * dim
            case "SQfp16":
                return 2 * dim
            case "SQ8":
                return dim
            case _:
                return (self.parts * self.bits + 7) // 8


def parse(factory: str) -> Kind:
    """What `factory` names. Raises ValueError for what is none of the kinds."""
    found = _PATTERN.fullmatch(factory)
    if found is None or not factory:
        raise ValueError(f"index.factory is {factory!r}: allowed are {ALLOWED}")
    opq, lists, links, parts, bits = (int(found[name] or 0) for name in ("opq", "lists", "links", "parts", "bits"))
    codec = "PQ" if parts else found["codec"] or ("Flat" if links else "")
    if not codec or factory.endswith(",") or (links and codec == "PQ") or (opq and codec != "PQ"):
        raise ValueError(f"index.factory is {factory!r}: allowed are {ALLOWED}")
    if parts and not PQ_BITS[0] <= (bits or 8) <= PQ_BITS[1]:
        allowed = f"{PQ_BITS[0]} to {PQ_BITS[1]}"
        raise ValueError(f"index.factory is {factory!r}, with {bits} bits a part: allowed are {allowed}")
    if opq and opq != parts:
        example = "OPQ16,IVF1024,PQ16"
        raise ValueError(f"index.factory is {factory!r}: OPQ and PQ need the same number of parts, like {example}")
    if links > MAX_LINKS or links == 1:
        raise ValueError(f"index.factory is {factory!r}: allowed are 2 to {MAX_LINKS} links")
    return Kind(factory, codec, lists, links, parts, (bits or 8) if parts else 0, bool(opq))


def check_kind(kind: Kind, device: str, num_vectors: int, training_sample: int, rescore_candidates: int) -> None:
    """Raise ValueError where `num_vectors` (of the smallest shard) or other settings do not fit the kind."""
    factory = kind.factory
    if device == "gpu":
        check_gpu_kind(kind)
    if kind.lists > num_vectors:
        raise ValueError(
            f"index.factory is {factory!r}, which trains {kind.lists} lists, but a shard holds {num_vectors} "
            f"vectors: allowed are 1 to {num_vectors} lists"
        )
    needed = kind.training_vectors
    if needed > num_vectors:
        raise ValueError(
            f"index.factory is {factory!r}, which trains on {needed} vectors or more (2 to the power of its bits), but "
            f"a shard holds {num_vectors}: take fewer bits, like PQ{kind.parts}x4, fewer shards, or SQ8"
        )
    if needed > training_sample:
        raise ValueError(f"index.training_sample is {training_sample}: {factory!r} needs {needed} or more")
    if rescore_candidates and not kind.compressed:
        raise ValueError(
            f"index.rescore_candidates is {rescore_candidates}: allowed is 0 with index.factory {factory}, whose "
            "scores come from whole vectors already"
        )


def check_products(products: str, kind: Kind, device: str) -> None:
    """Raise ValueError for products that no search of the kind makes use of."""
    if products not in PRODUCTS:
        raise ValueError(f"index.products is {products!r}: allowed are {', '.join(PRODUCTS)}")
    if products != "float32" and not (kind.exhaustive and device == "cpu"):
        raise ValueError(
            f"index.products is {products}: allowed is float32 with index.factory {kind.factory} on {device}; it is "
            f"{' and '.join(EXHAUSTIVE)} on cpu that it serves"
        )


def check_dim(kind: Kind, dim: int) -> None:
    """Raise ValueError where vectors of `dim` numbers cannot be cut into the kind's parts."""
    if kind.parts and dim % kind.parts:
        fitting = [parts for parts in range(1, dim + 1) if dim % parts == 0]
        near = sorted(sorted(fitting, key=lambda parts: abs(parts - kind.parts))[:3])
        raise ValueError(
            f"index.factory is {kind.factory!r}, but vectors of {dim} numbers cannot be cut into {kind.parts} equal "
            f"parts: allowed are divisors of {dim}, like {', '.join(map(str, near))}"
        )


def check_gpu_kind(kind: Kind) -> None:
    """Raise ValueError for a kind that FAISS has for CPU only."""
    if kind.links:
        raise ValueError(f"index.factory is {kind.factory!r}, which FAISS has for CPU only: set index.device=cpu")
    if not kind.lists and not kind.exhaustive:
        raise ValueError(
            f"index.factory is {kind.factory!r}, which FAISS has for CPU only: with index.device gpu allowed are Flat, "
            f"SQfp16 and IVFn,... (like IVF1024,{kind.codec}{kind.parts or ''})"
        )
    if kind.parts and (kind.bits != 8 or kind.parts not in GPU_PARTS):
        allowed = ", ".join(map(str, GPU_PARTS))
        raise ValueError(f"index.factory is {kind.factory!r}: on GPU allowed are 8 bits and {allowed} parts")
