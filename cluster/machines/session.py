"""Join the Ray cluster that RAY_ADDRESS names, or start one for this process on the loopback interface.

What this process starts, it owns: every part of a local Ray ends with it, also when it is killed (Ray's processes get
a parent-death signal; its two agents notice within about a minute). The token of a local Ray lies in a file that only
its user reads; children find it in their home directory, so that it stands in no runtime environment and no log.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machines.allocator import keeping_freed_memory

NAMESPACE = "tandem"
MIN_LOGICAL_CPUS = 4  # a Ray CPU is a ticket: trainer, controller and tests must fit on a machine with two cores
START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 512 * 2**20  # of a local Ray without larger wishes; it spills to disk beyond

# Read by Ray when it is imported or started; what the user has set wins.
QUIET = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report of a checkpoint waits for this poll, 2 s otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that asked for no GPU sees none
}
LOCAL = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then takes 127.0.0.1 as this machine's address, on Linux too
    "RAY_worker_niceness": "0",  # 15 otherwise, which leaves refresh workers no room below the trainers
}


@dataclass(frozen=True)
class Session:
    """A connection to Ray; `stop` ends it once, however often it is called."""

    namespace: str
    address: str
    local: bool  # started by this process
    logs: str  # folder of Ray's own logs, for messages

    def stop(self) -> None:
        """Disconnect; a local Ray ends."""
        import ray

        if ray.is_initialized():
            ray.shutdown()


def set_environment() -> None:
    """Set what Ray reads when it is imported; call it before. Harmless when repeated."""
    wanted = QUIET if os.environ.get("RAY_ADDRESS") else {**QUIET, **LOCAL, **keeping_freed_memory()}
    missing = [name for name in wanted if name not in os.environ]
    if missing and "ray" in sys.modules:
        raise RuntimeError(f"Ray was imported before set_environment could set {', '.join(missing)}")
    os.environ.update({name: wanted[name] for name in missing})


def logical_cpus() -> int:
    """What a Ray that is started here counts with."""
    return max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


def start_or_join(
    namespace: str = NAMESPACE,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    log_to_driver: bool = True,
    num_gpus: int | None = None,
) -> Session:
    """Join the cluster at RAY_ADDRESS, or start Ray here with token authentication.

    Raises ConnectionError when the cluster does not answer, RuntimeError when this process is connected already,
    imported Ray before `set_environment`, or cannot start it.
    """
    set_environment()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address and os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_private_token()
    import ray

    if ray.is_initialized():
        raise RuntimeError("this process is connected to Ray already")
    logging.getLogger("ray.train.v2._internal.execution.context").setLevel(logging.WARNING)
    if address:
        context: Any = ray.init(namespace=namespace, logging_level=logging.WARNING, log_to_driver=log_to_driver)
    else:
        context = _start_patiently(
            address="local",
            namespace=namespace,
            num_cpus=logical_cpus(),
            num_gpus=num_gpus,
            object_store_memory=object_store_bytes,
            include_dashboard=os.environ.get("TANDEM_DASHBOARD") == "1",  # ten processes, half a minute of two cores
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=log_to_driver,
            _node_ip_address="127.0.0.1",
        )
    info = context.address_info
    return Session(namespace, info["gcs_address"], not address, str(Path(info["session_dir"]) / "logs"))


def _start_patiently(**settings: Any) -> Any:
    """`ray.init`, again where a loaded machine was slower than the 30 s that Ray gives itself. Raises RuntimeError."""
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
    """A token that only this user can read, made here because Ray would leave it readable for everyone."""
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
