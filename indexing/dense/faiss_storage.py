"""Puts vectors into a FAISS index without unneeded memory.

FAISS's lists grow by doubling: after an `add` they hold up to twice, on average 1.4 times, the memory that they need,
for as long as the index lives. `add_to_lists` gives each list its final size first. An exhaustive index needs no second
copy at all: `room_for` makes its storage before the vectors come, and they are written into it directly.
"""

from typing import Any

import numpy as np

ADD_ROWS = 1 << 16  # Number of vectors assigned and added at a time


def room_for(index: Any, num_rows: int) -> None:
    """Give an empty CPU index of codes (Flat, SQfp16) storage for `num_rows` vectors, all zero. The caller writes them
    there and then sets `ntotal` to `num_rows`."""
    index.codes.resize(num_rows * index.code_size)


def add_to_lists(faiss: Any, index: Any, vectors: np.ndarray) -> None:
    """Add float32 `vectors` [n, dim] as `index.add` does, with lists of exactly the size that they need. An index whose
    lists are not plain ones in memory, or which is not empty, grows as FAISS does it."""
    lists: Any = faiss.downcast_InvertedLists(index.invlists) if isinstance(index, faiss.IndexIVF) else None
    if not isinstance(lists, faiss.ArrayInvertedLists) or index.ntotal:
        index.add(vectors)
        return
    owners = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), ADD_ROWS):
        part = vectors[start : start + ADD_ROWS]
        owners[start : start + len(part)] = index.quantizer.search(part, 1)[1][:, 0]
    for number, size in enumerate(np.bincount(owners, minlength=index.nlist)):
        lists.resize(number, int(size))
        lists.resize(number, 0)  # this keeps the memory
    for start in range(0, len(vectors), ADD_ROWS):
        part, where = vectors[start : start + ADD_ROWS], owners[start : start + ADD_ROWS]
        index.add_core(len(part), faiss.swig_ptr(part), None, faiss.swig_ptr(where))
