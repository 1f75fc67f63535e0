"""The reference of alignment: the system at the start of the stage, frozen, on the same passages.

With full weights it is a copy outside of the engine and of the trained parameter groups, so that it is an ordinary
module under every ZeRO stage. It is loaded from the checkpoint that the stage started from, never from one of the stage
itself, so that a resumed stage has the reference that it began with; an error says so if that checkpoint is gone. If
only adapters train, the reference is the system itself with its adapters off (`training/models/parts/adapters.py`), and
needs no file.
"""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from training.checkpoint import load_weights
from training.engine.engine import Engine
from training.models.build import fit_weights
from training.models.model_inputs import CandidateBatch
from training.models.parts.adapters import adapters_disabled, trains_adapters_only
from training.models.parts.modes import evaluating
from training.models.parts.named_weights import load_weights_into, named_weights
from training.models.system import System
from training.objectives.preference import Candidates

ORIGIN_FILE = "reference.json"  # in the run folder; names the checkpoint that the stage began with


class Reference:
    """Scores batches as the system did at the start of the stage."""

    def __init__(self, engine: Engine, frozen: System | None, offload: bool) -> None:
        """`frozen` is a separate module; None takes the engine's module with its adapters off."""
        self.engine, self.frozen, self.offload = engine, frozen, offload
        if frozen is not None:
            frozen.requires_grad_(False).eval()
            frozen.to("cpu" if offload else engine.device, engine.weights_dtype)

    @torch.no_grad()
    def __call__(self, batch: CandidateBatch) -> CandidateBatch:
        """Return the batch with `reference_scores` and `reference_log_probs`. Collective under ZeRO 3."""
        outputs = self._adapters_off(batch) if self.frozen is None else self._frozen(self.frozen, batch)
        assert outputs.log_probs is not None
        return replace(batch, reference_scores=outputs.scores, reference_log_probs=outputs.log_probs)

    def _frozen(self, frozen: System, batch: CandidateBatch) -> Candidates:
        device = self.engine.device
        if self.offload:
            frozen.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.engine.config.precision == "bf16_autocast"):
            outputs = frozen.candidates(batch)
        if self.offload:
            frozen.to("cpu")
        return outputs

    def _adapters_off(self, batch: CandidateBatch) -> Candidates:
        with adapters_disabled(self.engine.module), evaluating(self.engine.module):
            return self.engine(System.candidates, batch)


def build_reference(
    engine: Engine, initial: System | None, *, offload: bool, init_from: str, run_dir: Path, resumes: bool
) -> Reference:
    """Return the reference of a stage. Collective.

    `initial` is the result of `initial_copy` before the engine took the system. `init_from` is the checkpoint whose
    weights the stage starts from, empty if it starts as built. Raises ValueError if a stage that `resumes` began with
    another checkpoint than the present one.
    """
    if initial is None:
        return Reference(engine, None, False)
    has_origin = engine.rank == 0 and bool(init_from)
    origin = engine.broadcast_object(_origin(Path(init_from), run_dir, resumes) if has_origin else "")
    if isinstance(origin, ValueError):
        raise origin
    state = load_weights(Path(origin)) if origin and engine.rank == 0 else {}
    problem = None
    if state:
        try:
            load_weights_into(initial, fit_weights(state, initial))
        except ValueError as error:
            problem = str(error)
    problem = engine.broadcast_object(problem)
    if problem is not None:
        raise ValueError(f"{origin} is no reference for this system: {problem}")
    _share(initial, engine)
    return Reference(engine, initial, offload)


def initial_copy(system: System) -> System | None:
    """Return a copy of the system as built, since the engine may shard or cast the original; None if only adapters
    train."""
    return None if trains_adapters_only(system) else copy.deepcopy(system)


def _share(module: System, engine: Engine) -> None:
    """Send rank 0's weights to every rank."""
    if engine.world_size == 1:
        return
    for tensor in named_weights(module).values():
        whole = tensor.detach().to(engine.device)
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)


def _origin(init_from: Path, run_dir: Path, resumes: bool) -> str | ValueError:
    """Return the checkpoint that this stage began with, and write it down when it begins. Return an error, which all
    ranks can raise, if the checkpoint is gone."""
    record = run_dir / ORIGIN_FILE
    if not (resumes and record.is_file()):
        record.parent.mkdir(parents=True, exist_ok=True)
        content = {"checkpoint": str(init_from), "manifest_sha256": _fingerprint(init_from)}
        record.write_text(json.dumps(content), encoding="utf-8")
        return str(init_from)
    known = json.loads(record.read_text(encoding="utf-8"))
    for path in (Path(known["checkpoint"]), init_from):
        if _fingerprint(path) == known["manifest_sha256"]:
            return str(path)
    return ValueError(
        f"run.init_from={str(init_from)!r}: this stage began with {known['checkpoint']}, which is gone or was "
        "changed, and a resume needs the same reference: bring it back, take another run.name, or set "
        "run.overwrite=true"
    )


def _fingerprint(checkpoint: Path) -> str:
    """Return a hash of the manifest, which holds a checksum of every file."""
    manifest = checkpoint / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
