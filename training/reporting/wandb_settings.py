"""The W&B mode and the W&B run of a run directory; needs no W&B."""

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from indexing.declare import check_values
from training.training_settings import MonitorConfig


def wandb_mode(setting: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the mode, `online`, `offline` or `off`, that `monitor.wandb` means here. Raises ValueError if it is
    unknown."""
    check_values(MonitorConfig(wandb=setting), "monitor.")
    match setting:
        case "off" | "online" | "offline":
            return "offline" if setting == "online" and not has_key(environment) else setting
        case _:
            asked = environment.get("WANDB_MODE", "")
            if asked in ("disabled", "offline"):
                return {"disabled": "off", "offline": "offline"}[asked]
            return "online" if has_key(environment) else "offline"


def has_key(environment: Mapping[str, str]) -> bool:
    """Return whether a W&B key is in the environment or in netrc; nobody is ever asked for one."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_identifier(run_dir: Path) -> str:
    """Return the W&B identifier of this run directory. It is drawn once and kept, so that a resume continues the same
    run."""
    path = run_dir / "wandb" / "run-id.txt"
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    identifier = secrets.token_hex(4)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(identifier, encoding="utf-8")
    temporary.replace(path)
    return identifier
