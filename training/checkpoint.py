"""Writes and reads `checkpoints/step-N/`, one directory with everything that a resume needs.

    engine/             DeepSpeed's weights, fp32 masters and optimiser state, one file per rank
    rank-R.pt           random states and place in the data of rank R
    model.safetensors   weights by name (adapters merged), for evaluation and for the next stage
    state.json          step, loop counters and index generation, the same on all ranks
    ...                 copies (configuration, tokenisers)
    manifest.json       size and checksum of all of it, written last

Every rank writes its part; when all have, rank 0 seals the directory with the manifest, then moves the pointer
`checkpoints/latest` (for people; readers look for the newest directory that matches its manifest) and removes old
checkpoints. If a rank fails (a full disk), nobody seals: the directory is removed and every rank raises.

The files under engine/ and rank-R.pt are pickles, thus code: load them only from a run that you trust. The safetensors
file is data.
"""

import json
import pickle
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from indexing.corpus import snapshot
from training.models.parts.adapters import has_adapters
from training.models.parts.named_weights import tied_names

if TYPE_CHECKING:
    from training.engine.engine import Engine

PREFIX = "step-"
WEIGHTS = "model.safetensors"
# Classes in the files of ranks, under the names that earlier versions gave them.
_INPUTS = "training.models.model_inputs"
MOVED = {
    ("indexing.merge", "CorpusState"): ("indexing.hits", "CorpusState"),
    ("training.models.batches", "RetrievalBatch"): (_INPUTS, "RetrievalBatch"),
    ("training.models.batches", "CandidateBatch"): (_INPUTS, "CandidateBatch"),
    ("training.models.generator", "ReaderBatch"): ("training.models.generators.generator", "GeneratorBatch"),
}


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    engine: "Engine",
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    keep: int,
    protected: Sequence[int] = (),
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Write `checkpoints/step-{step}`; collective, between optimiser steps. A whole one that is there is left alone.

    `state` holds JSON values, and that of rank 0 counts; `rank_state` holds this rank's picklable values. `keep` is the
    number of newest checkpoints that stay, beside the steps in `protected`. `files` maps names in the checkpoint to
    files or folders to copy. Raises OSError on every rank if a rank could not write; earlier checkpoints are then
    untouched.
    """
    parent = run_dir / "checkpoints"
    directory = parent / f"{PREFIX}{step}"
    if engine.broadcast_object(engine.rank == 0 and _whole(directory)):
        return directory
    _together(engine, directory, _on_rank_0(engine, lambda: _prepare(parent, directory, step)))
    failures = [_attempt(lambda: engine.save(directory / "engine"))]
    weights = engine.consolidated_state()  # collective: also on a rank that has failed

    def write_shared() -> None:
        # An adapter's small changes would be lost in 16 bits.
        dtype = torch.float32 if has_adapters(engine.module) else engine.weights_dtype
        save_file(_as_saved(weights, dtype), directory / WEIGHTS, _metadata(engine))
        (directory / "state.json").write_text(json.dumps(dict(state), allow_nan=False))
        for name, source in (files or {}).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, directory / name)

    failures.append(_attempt(lambda: torch.save(dict(rank_state), directory / f"rank-{engine.rank}.pt")))
    failures.append(_on_rank_0(engine, write_shared))
    _together(engine, directory, next((failure for failure in failures if failure), None))

    def seal() -> None:
        snapshot.write_manifest(directory, {"step": step, "num_ranks": engine.world_size})
        snapshot.write_file(parent / "latest", [f"{directory.name}\n".encode()])

    _together(engine, directory, _on_rank_0(engine, seal))
    if engine.rank == 0:
        snapshot.prune(parent, PREFIX, keep, protected)
    return directory


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None], contents: bool = True) -> Path | None:
    """Return the newest checkpoint whose contents match its manifest; `warn` gets a message for each refused one.
    `contents` False compares sizes only."""
    found = snapshot.newest_complete(run_dir / "checkpoints", PREFIX, warn, contents)
    return found[1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """Return the step at which a checkpoint was saved; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix(PREFIX))


def load_checkpoint(path: Path, engine: "Engine") -> tuple[dict[str, Any], dict[str, Any]]:
    """Put weights and optimiser state into a new engine; return (state, this rank's rank_state). Collective.

    `path` comes from `newest_checkpoint`, which has read and compared every byte, so that only names and sizes are
    checked here. Raises TornSnapshot, and ValueError if the number of ranks or the engine's settings differ from those
    of the save.
    """
    snapshot.verify(path, contents=False)
    engine.load(path / "engine")
    state = json.loads((path / "state.json").read_text())
    rank_file = path / f"rank-{engine.rank}.pt"
    return state, torch.load(rank_file, map_location="cpu", weights_only=False, pickle_module=_Pickles)


class _Pickles:
    """A pickle module for `torch.load`, for files in which classes may have the names of earlier versions."""

    class Unpickler(pickle.Unpickler):
        """Finds moved classes under their present names."""

        def find_class(self, module: str, name: str) -> Any:
            """Return the class of a name in the file."""
            return super().find_class(*MOVED.get((module, name), (module, name)))

    load = staticmethod(pickle.load)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the checkpoint at `path` on the CPU, in the type that computed (bfloat16 or float32), under
    all names that a shared weight has; verified. Raises TornSnapshot."""
    snapshot.verify(path)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return weights | {name: weights[first] for name, first in tied.items()}


def saved_names(path: Path) -> set[str]:
    """Return the names of the weights of the checkpoint at `path`; a shared one has its first name only. Raises
    TornSnapshot."""
    snapshot.verify(path, contents=False)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return set(file.keys())


def rng_state() -> dict[str, Any]:
    """Return the states of the generators of Python, numpy and torch, and of CUDA on this rank's device."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, Any]) -> None:
    """Set the generators back to `rng_state`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _prepare(parent: Path, directory: Path, step: int) -> None:
    """Make an empty directory; remove damaged checkpoints of this and later steps, which a resume has refused."""
    for path in parent.glob(f"{PREFIX}*") if parent.is_dir() else ():
        number = path.name.removeprefix(PREFIX)
        if number.isdecimal() and int(number) >= step and not _whole(path):
            shutil.rmtree(path)
    (directory / "engine").mkdir(parents=True)


def _whole(directory: Path) -> bool:
    try:
        snapshot.verify(directory)
    except snapshot.TornSnapshot:
        return False
    return True


def _as_saved(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: (w.to(dtype) if w.is_floating_point() else w).contiguous() for name, w in weights.items()}


def _metadata(engine: "Engine") -> dict[str, str]:
    return {"format": "pt", "tied": json.dumps(tied_names(engine.module))}


def _attempt(write: Callable[[], object]) -> str | None:
    """Return why `write` failed, or None. torch and safetensors have special errors for a full disk."""
    try:
        write()
    except Exception as error:  # `_together` raises it on all ranks
        return f"{type(error).__name__}: {error}"
    return None


def _on_rank_0(engine: "Engine", write: Callable[[], object]) -> str | None:
    return _attempt(write) if engine.rank == 0 else None


def _together(engine: "Engine", directory: Path, failure: str | None) -> None:
    """Wait for all ranks; if one failed, remove the directory and raise OSError on all."""
    failures = [(rank, why) for rank, why in enumerate(engine.gather_objects(failure)) if why]
    if not failures:
        return
    if engine.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    engine.barrier()
    rank, why = failures[0]
    raise OSError(f"could not write checkpoint {directory} (rank {rank}: {why}); earlier checkpoints are whole")
