"""The stores that a run was started with, found again wherever the run folder lies.

`corpus/base.json` of a run names its store of passages and its tokenisers relative to itself. Runs of earlier versions
have absolute paths there; what they name is looked for beside the run first.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from indexing.corpus.snapshot import MANIFEST, write_file

BASE_FILE = "base.json"


def record_stores(folder: Path, passages: Path, tokenizers: Path) -> None:
    """Note in the run folder `folder` which store of passages and which tokenisers it was started with."""
    corpus = folder.resolve() / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    places = {"passages": passages, "tokenizers": tokenizers}
    base = {name: os.path.relpath(path.resolve(), corpus) for name, path in places.items()}
    write_file(corpus / BASE_FILE, [json.dumps(base).encode()])


def recorded_stores(folder: Path) -> tuple[Path, Path] | None:
    """Return the store of passages and the folder of tokenisers of the run folder `folder`; None where it has no note
    of them, or they are gone."""
    corpus = folder.resolve() / "corpus"
    try:
        base = json.loads((corpus / BASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = Path(base["passages"]), Path(base["tokenizers"])
    near = [(up / Path(*named[0].parts[-3:]), up / named[1].name) for up in (corpus.parent, *corpus.parent.parents[:4])]
    if not named[0].is_absolute():
        near.insert(0, (Path(os.path.normpath(corpus / named[0])), Path(os.path.normpath(corpus / named[1]))))
    return next((places for places in (*near, named) if all(place.is_dir() for place in places)), None)


def check_same_data(folder: Path, passages: Path, questions: Mapping[str, Path]) -> None:
    """Refuse to go on in the run folder `folder`, or to take it for finished, with other passages or questions than it
    was started with. `questions`: the store of each split. Raises ValueError that names what has changed."""
    found = recorded_stores(folder)
    if found is None or found[0].resolve() == passages.resolve():
        return
    stores = {"passages": (found[0], passages)}
    stores |= {f"questions {split}": (found[0].parent / path.name, path) for split, path in questions.items()}
    changed = [name for name, (before, now) in stores.items() if before.is_dir() and not _are_alike(before, now)]
    if changed:
        raise ValueError(
            f"{folder} was started with other data ({', '.join(changed)} have changed since): take another run.name, "
            "or set run.overwrite=true"
        )


def _are_alike(before: Path, now: Path) -> bool:
    """Return true if two stores have the same files, by size and checksum."""
    files = [json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"] for path in (before, now)]
    return files[0] == files[1]


def root_of_stores(folder: Path) -> Path:
    """Return the folder that holds data/, tokenizers/ and world/ for the run folder `folder`: that of the experiment
    which it is a stage of, or its own."""
    found, at = recorded_stores(folder), folder.resolve()
    if found is None and not (folder / "data").is_dir():  # of a version that made no such note
        roots = (up for up in at.parents[:2] if (up / "data").is_dir() and (up / "tokenizers" / "retriever").is_dir())
        return next(roots, folder)
    if found is None or found[0].parent.parent.name != "data" or found[1] != found[0].parents[2] / "tokenizers":
        return folder
    return folder if found[1].parent == at else found[1].parent
