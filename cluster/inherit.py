"""The index that a stage takes over from the run that it starts from, instead of encoding the same passages again."""

import json
import os
import shutil
from pathlib import Path

from cluster.settings import Settings
from cluster.snapshots import PREFIX, IndexIdentity, check_snapshot
from indexing.build import HALVES
from indexing.snapshot import TornSnapshot

PASSAGES_FIXED = ("query_only", "generator_only", "none")  # training.train that leaves the passage encoder alone


def inherit_index(settings: Settings, init_from: str, run_dir: Path, identity: IndexIdentity) -> Path | None:
    """The generation that the checkpoint `init_from` names, linked into `run_dir/index`; None where it cannot serve.

    It serves where it was built from the checkpoint's own passage encoder, which this stage does not train, and where
    corpus, tokeniser and kind of index are the same (`identity`), on any number of shards that it can be spread over.
    """
    if not init_from or settings.training.train not in PASSAGES_FIXED or settings.refresh.precision != "float32":
        return None
    checkpoint = Path(init_from)
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    name = f"{PREFIX}{state['generation']}"
    source, target = checkpoint.parents[1] / "index" / name, run_dir / "index" / name
    if not state.get("index_is_current") or not source.is_dir():
        return None
    if settings.index.rescore_candidates and not list(source.rglob(f"*{HALVES}")):
        return None
    try:
        check_snapshot(source, identity, contents=False)
        if not target.exists():
            partial = target.with_name(f".{name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial, copy_function=_link)
            partial.rename(target)
        check_snapshot(target, identity)
    except (TornSnapshot, ValueError, OSError):
        return None
    return target


def _link(source: str, target: str) -> None:
    """The files of a generation are never written again: a second name for them is enough, on the same disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
