"""Joins the Ray cluster that RAY_ADDRESS names, or starts one for this process on the loopback interface.

This process owns what it starts: every part of a local Ray ends with it, also when it is killed (Ray's processes get a
parent-death signal; its two agents notice within about a minute). The token of a local Ray is in a file that only its
user reads; child processes find it in their home directory, so that no runtime environment and no log contains it.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machines.allocator import keeping_freed_memory
from cluster.machines.stopping import sparing_children
from indexing.allowance import usable_cpus

NAMESPACE = "tandem"
MIN_LOGICAL_CPUS = 4  # a Ray CPU is a ticket: trainer, controller and tests must fit on a machine with two cores
START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 512 * 2**20  # of a local Ray, if nothing larger is set; it spills to disk beyond

# Ray reads these when it is imported or started; values that the user has set win.
QUIET = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report of a checkpoint waits for this poll, 2 s otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that asked for no GPU sees none
}
LOCAL = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux, too, Ray then takes 127.0.0.1 as this machine's address
    "RAY_worker_niceness": "0",  # 15 otherwise, which leaves refresh workers no room below the trainers
}


@dataclass(frozen=True)
class Session:
    """A connection to Ray; `stop` ends it once, however often it is called."""

    namespace: str
    address: str
    local: bool  # True if this process started it
    logs: str  # folder of Ray's logs, for messages

    def stop(self) -> None:
        """Disconnect; a local Ray ends."""
        import ray

        if ray.is_initialized():
            with sparing_children():
                ray.shutdown()


def set_environment() -> None:
    """Set the variables that Ray reads when it is imported; call it before. Repeating it does no harm."""
    wanted = QUIET if os.environ.get("RAY_ADDRESS") else {**QUIET, **LOCAL, **keeping_freed_memory()}
    missing = [name for name in wanted if name not in os.environ]
    if missing and "ray" in sys.modules:
        raise RuntimeError(f"Ray was imported before set_environment could set {', '.join(missing)}")
    os.environ.update({name: wanted[name] for name in missing})


def logical_cpus() -> int:
    """Return the number of CPUs that a Ray started here counts with."""
    return max(MIN_LOGICAL_CPUS, usable_cpus())


def start_or_join(
    namespace: str = NAMESPACE,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    log_to_driver: bool = True,
    num_gpus: int | None = None,
) -> Session:
    """Join the cluster at RAY_ADDRESS, or start Ray here with token authentication.

    Raises ConnectionError if the cluster does not answer, RuntimeError if this process is connected already, imported
    Ray before `set_environment`, or cannot start it.
    """
    set_environment()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address and os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_private_token()
    import ray

    if ray.is_initialized():
        raise RuntimeError("this process is connected to Ray already")
    logging.getLogger("ray.train.v2._internal.execution.context").setLevel(logging.WARNING)
    with sparing_children():  # Ray puts a handler of its own in the place of ours
        if address:
            context: Any = ray.init(namespace=namespace, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        else:
            context = _start_patiently(
                address="local",
                namespace=namespace,
                num_cpus=logical_cpus(),
                num_gpus=num_gpus,
                object_store_memory=object_store_bytes,
                include_dashboard=os.environ.get("TANDEM_DASHBOARD") == "1",  # ten processes, half a minute of CPU
                dashboard_host="127.0.0.1",
                logging_level=logging.WARNING,
                log_to_driver=log_to_driver,
                _node_ip_address="127.0.0.1",
            )
    info = context.address_info
    return Session(namespace, info["gcs_address"], not address, str(Path(info["session_dir"]) / "logs"))


def _start_patiently(**settings: Any) -> Any:
    """Call `ray.init`, and again if a loaded machine was slower than the 30 s that Ray waits. Raises RuntimeError."""
    import ray

    for _ in range(START_ATTEMPTS):
        try:
            return ray.init(**settings)
        except Exception as error:  # Ray raises this very class
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise RuntimeError(f"Ray did not start in {START_ATTEMPTS} attempts of 30 s; is this machine overloaded?")


def _ensure_private_token() -> None:
    """Make a token that only this user can read; Ray would leave it readable for everyone."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.exists():
        if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        return
    from secrets import token_hex

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another process was faster
        return
    except OSError as error:
        print(f"cannot write Ray's token to {path}: {error}; set RAY_AUTH_TOKEN_PATH", file=sys.stderr)
        raise
    with os.fdopen(descriptor, "w") as file:
        file.write(token_hex(32))
