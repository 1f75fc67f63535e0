"""Read pooling, projections, normalisation and limits of an encoder from a sentence-transformers folder or hub name.

The library is not needed. Both layouts of its files are read: the older (`pooling_mode_mean_tokens: true`,
`max_seq_length` in sentence_bert_config.json) and the newer (`pooling_mode: "mean"`, limit in tokenizer_config.json).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from indexing.declare import refuse

POOLINGS = ("mean", "cls", "max", "last")
_SAVED_POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_OLDER_POOLINGS = {  # in the order in which that library concatenates them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, kw_only=True)
class DenseLayout:
    """Describes a projection after the pooling: sizes, activation (a torch.nn class name) and the file of weights."""

    in_features: int
    out_features: int
    bias: bool
    activation: str
    weights: Path


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Describes how token states become a vector."""

    pooling: tuple[str, ...]  # of POOLINGS; several are concatenated
    normalize: bool
    dense: list[DenseLayout] = field(default_factory=list)
    max_tokens: int | None = None  # number of tokens that the checkpoint was made for
    transformer_folder: str = ""  # folder of the transformer's files, below the root
    query_prompt: str = ""  # text before every question; likewise the next one before every passage
    passage_prompt: str = ""


def find_file(name: str, file: str) -> Path | None:
    """Return the local path of `file` in a folder or hub repository; None if it is missing or cannot be reached."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(path) if path else None


def find_config(name: str, folder: str = "") -> Path | None:
    """Return the local path of the configuration of a checkpoint whose transformer lies in `folder`, or None."""
    return find_file(name, f"{folder}/config.json" if folder else "config.json")


def read_layout(name: str) -> Layout | None:
    """Return the layout of a sentence-transformers checkpoint; None for one without modules.json. Raises ValueError,
    naming `encoder.name`, for modules and pooling modes that are not supported."""
    modules_path = find_file(name, "modules.json")
    if modules_path is None:
        return None
    modules = json.loads(modules_path.read_text(encoding="utf-8"))
    pooling: tuple[str, ...] = ()
    dense: list[DenseLayout] = []
    normalize = False
    folder = ""
    for module in modules:
        kind, path = module["type"].rsplit(".", 1)[-1], module["path"]
        if normalize:
            raise ValueError(f"encoder.name={name!r}: module {kind} after Normalize is not supported")
        match kind:
            case "Transformer":
                folder = path
            case "Pooling":
                pooling = _read_pooling(name, _read_json(name, f"{path}/config.json"))
            case "Dense":
                dense.append(_read_dense(name, path))
            case "Normalize":
                normalize = True
            case "Dropout":
                pass
            case _:
                raise ValueError(
                    f"encoder.name={name!r} contains a module {kind}; "
                    "allowed: Transformer, Pooling, Dense, Normalize, Dropout"
                )
    if not pooling:
        raise ValueError(
            f"encoder.name={name!r} has a modules.json without a Pooling module: not a text embedding model"
        )
    prompts = _read_json(name, "config_sentence_transformers.json").get("prompts") or {}
    return Layout(
        pooling=pooling,
        normalize=normalize,
        dense=dense,
        max_tokens=_read_max_tokens(name, folder),
        transformer_folder=folder,
        query_prompt=prompts.get("query") or "",
        passage_prompt=prompts.get("document") or prompts.get("passage") or "",
    )


def transformer_folder(name: str) -> str:
    """Return the folder of a checkpoint's transformer below its root; older sentence-transformers folders have one."""
    modules = _read_json(name, "modules.json") or []
    return next((module["path"] for module in modules if module["type"].rsplit(".", 1)[-1] == "Transformer"), "")


def _read_json(name: str, file: str) -> Any:
    path = find_file(name, file)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _read_pooling(name: str, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the pooling modes of 1_Pooling/config.json, older or newer."""
    saved = config.get("pooling_mode")
    if saved is None:
        modes = [mode for key, mode in _OLDER_POOLINGS.items() if config.get(key)] or ["mean"]
    else:
        modes = [saved] if isinstance(saved, str) else list(saved)
    unknown = [mode for mode in modes if mode not in _SAVED_POOLINGS]
    if unknown:
        allowed = ", ".join(_SAVED_POOLINGS)
        raise refuse("encoder.name", name, f"must pool by {allowed}, not by {', '.join(unknown)}")
    if config.get("include_prompt") is False:
        allowed = "must pool its prompt too; this one leaves it out (include_prompt: false)"
        raise refuse("encoder.name", name, allowed)
    return tuple(_SAVED_POOLINGS[mode] for mode in modes)


def _read_dense(name: str, path: str) -> DenseLayout:
    """Return sizes and activation of a Dense module. A file may name activations of torch.nn only, no other code."""
    config = _read_json(name, f"{path}/config.json")
    activation = config.get("activation_function") or "torch.nn.modules.linear.Identity"
    if not activation.startswith("torch.nn."):
        raise refuse("encoder.name", name, f"must have activations of torch.nn, but {path} has {activation}")
    if config.get("use_residual"):
        raise refuse("encoder.name", name, f"must be without use_residual, which {path} has")
    weights = find_file(name, f"{path}/model.safetensors") or find_file(name, f"{path}/pytorch_model.bin")
    if weights is None:
        raise refuse("encoder.name", name, f"must have model.safetensors or pytorch_model.bin in {path}")
    return DenseLayout(
        in_features=config["in_features"],
        out_features=config["out_features"],
        bias=config.get("bias", True),
        activation=activation.rsplit(".", 1)[-1],
        weights=weights,
    )


def _read_max_tokens(name: str, folder: str) -> int | None:
    """Return max_seq_length (older layout) or the tokeniser's model_max_length (newer); None without a real limit."""
    prefix = f"{folder}/" if folder else ""
    limit = _read_json(name, f"{prefix}sentence_bert_config.json").get("max_seq_length")
    if limit is None:
        limit = _read_json(name, f"{prefix}tokenizer_config.json").get("model_max_length")
    return int(limit) if limit is not None and limit < 1_000_000 else None
