"""Runs one command on several machines: every machine of a Slurm or SSH job calls `python -m cluster.nodes VERB ...`.

Machine 0 (the head) writes the token, starts Ray's head, waits until all machines have joined, runs the command, and
stops the Ray that it started. Every other machine waits for the token and for the head, joins, and stays until the head
has gone. Each wait is bounded by TANDEM_NODES_TIMEOUT_S and ends with a message.

The exit code of the head is that of the command. A machine that cannot join exits with 1; one that did join exits with
0 when the head has gone, whose exit code then tells how it went. Only processes started here are stopped: `ray stop`,
with which `ray symmetric-run` ends, would take every Ray of the same user.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster import cli
from cluster.machines import session, stopping
from indexing.allowance import usable_cpus, usable_memory

STARTED = "Ray runtime started"  # the line that `ray start` prints when this machine has joined
RAY_MEMORY = 0.7  # Share of the free memory for processes; Ray keeps the rest for objects
STOP_RAY_S = 10.0  # that the Ray of this machine may take to end, after the command did
HEAD_GONE_S = 20.0  # that the head's port stays closed until it counts as gone: a busy machine may refuse a connection


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The place of this machine in the job."""

    head: str  # name or address of machine 0, as the others see it
    port: int
    num_nodes: int
    rank: int
    token_file: Path
    timeout_s: float


def from_environment(environment: dict[str, str]) -> Machine:
    """Read TANDEM_HEAD, TANDEM_NODES, TANDEM_NODE_RANK and, if set, TANDEM_TOKEN_FILE and TANDEM_NODES_TIMEOUT_S.
    Raises ValueError."""
    head, _, port = environment.get("TANDEM_HEAD", "").rpartition(":")
    num_nodes, rank = environment.get("TANDEM_NODES", ""), environment.get("TANDEM_NODE_RANK", "")
    timeout_s = environment.get("TANDEM_NODES_TIMEOUT_S", "300")
    if not head or not port.isdigit():
        raise ValueError(f"TANDEM_HEAD={environment.get('TANDEM_HEAD', '')}: must be HOST:PORT of machine 0")
    if not num_nodes.isdigit() or int(num_nodes) < 1:
        raise ValueError(f"TANDEM_NODES={num_nodes}: must be the number of machines")
    if not rank.isdigit() or int(rank) >= int(num_nodes):
        raise ValueError(f"TANDEM_NODE_RANK={rank}: must be 0 on the head, 1 to {int(num_nodes) - 1} on the others")
    if not timeout_s.isdigit():
        raise ValueError(f"TANDEM_NODES_TIMEOUT_S={timeout_s}: must be whole seconds")
    name = re.sub(r"[^A-Za-z0-9]", "-", environment.get("SLURM_JOB_ID", "") or f"{head}-{port}")
    token_file = Path(environment.get("TANDEM_TOKEN_FILE") or f"runs/.token-{name}").resolve()
    return Machine(
        head=head,
        port=int(port),
        num_nodes=int(num_nodes),
        rank=int(rank),
        token_file=token_file,
        timeout_s=float(timeout_s),
    )


def main(arguments: list[str]) -> int:
    """Take the part of this machine and return its exit code."""
    try:
        experiment = cli.read_experiment(arguments[1:])  # a mistake is answered before machines wait for each other
        machine = from_environment(dict(os.environ))
    except ValueError as error:
        return _say(str(error), 2)
    stopping.install()
    stopping.set_limit(experiment.last.cluster.stop_timeout_s + STOP_RAY_S)
    if machine.rank == 0:
        return _head(machine, arguments)
    return _follower(machine)


def _head(machine: Machine, arguments: list[str]) -> int:
    made_token = _make_token(machine.token_file)
    ray_node: subprocess.Popen[bytes] | None = None
    try:
        _set_environment(machine)
        address = f"{_own_address(machine)}:{machine.port}"
        os.environ["RAY_ADDRESS"] = address
        _say(f"starts the head at {address} for {machine.num_nodes} machines")
        log = _log_file()
        ray_node = _ray_start(
            ["--head", f"--node-ip-address={address.rpartition(':')[0]}", f"--port={machine.port}"], log
        )
        if not _wait_until_started(ray_node, log, machine.timeout_s):
            return _say(f"Ray's head did not start; its output: {log.name}", 1)
        if not _wait_for_machines(machine):
            return 1
        return _run_command(arguments)
    except stopping.Interrupted as signal_:
        return signal_.exit_code
    finally:
        if ray_node is not None:
            _stop(ray_node)
        if made_token:
            machine.token_file.unlink(missing_ok=True)


def _run_command(arguments: list[str]) -> int:
    """Run the command line as a child process; a signal is passed on, and the child gets time to save and end."""
    line = [sys.executable, "-P", "-m", "cluster.cli", *arguments]
    # In a session of its own: Ctrl-C of a terminal reaches it once, from here.
    command = subprocess.Popen(line, start_new_session=True, preexec_fn=stopping.end_with_parent)
    try:
        return command.wait()
    except stopping.Interrupted as signal_:
        command.send_signal(signal_.number)
        try:
            command.wait(stopping.left_s() - STOP_RAY_S)  # its own bound is cluster.stop_timeout_s
        except subprocess.TimeoutExpired:
            command.kill()
        raise


def _follower(machine: Machine) -> int:
    ray_node: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + machine.timeout_s
    try:
        while not (machine.token_file.is_file() and _answers(machine.head, machine.port)):
            if time.monotonic() > deadline:
                where = f"the head {machine.head}:{machine.port}, or no token in {machine.token_file}"
                hint = "the token is one file of mode 600 that all machines see (TANDEM_TOKEN_FILE)"
                return _say(f"found neither for {machine.timeout_s:.0f} s: {where}; {hint}", 1)
            time.sleep(1)
        _set_environment(machine)
        log = _log_file()
        ray_node = _ray_start([f"--address={machine.head}:{machine.port}"], log)
        if not _wait_until_started(ray_node, log, machine.timeout_s):
            return _say(f"machine {machine.rank} did not join {machine.head}:{machine.port}; output: {log.name}", 1)
        _say(f"machine {machine.rank} joined {machine.head}:{machine.port}")
        _wait_until_gone(machine, ray_node)
        return _say(f"machine {machine.rank}: the head has gone", 0)
    except stopping.Interrupted as signal_:
        if ray_node is not None:  # a scheduler stops all machines at once; the head saves with the help of this one
            with suppress(stopping.Interrupted):
                _wait_until_gone(machine, ray_node, after_s=3.0)
        return signal_.exit_code
    finally:
        if ray_node is not None:
            _stop(ray_node)


def _set_environment(machine: Machine) -> None:
    """Set the variables that Ray's processes and the command inherit."""
    for name, value in {**session.QUIET, **session.LOCAL}.items():
        if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER":
            os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(machine.token_file)
    os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")


def _make_token(path: Path) -> bool:
    """Write a token that only this user can read, complete at once. Returns True if there was none."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    draft.rename(path)
    return True


def _own_address(machine: Machine) -> str:
    """Return the address of the head as the others see it; many machines call themselves 127.0.1.1."""
    try:
        address = socket.gethostbyname(machine.head)
    except OSError:
        address = "127.0.0.1"
    if machine.num_nodes == 1 or not address.startswith("127."):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # this sends nothing; it picks the interface of the default route
        return probe.getsockname()[0]


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _log_file() -> IO[bytes]:
    return tempfile.NamedTemporaryFile(prefix="tandem-ray-start-", suffix=".log", delete=False)


def _ray_start(options: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `ray start --block` in a process group of its own, so that Ctrl-C reaches the command before Ray goes."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={usable_cpus()}", f"--memory={int(RAY_MEMORY * usable_memory()[1])}", *options]
    with stopping.sparing_children():
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=stopping.end_with_parent,
        )


def _wait_until_started(ray_node: subprocess.Popen[bytes], log: IO[bytes], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray_node.poll() is None:
        if STARTED in Path(log.name).read_text(encoding="utf-8", errors="replace"):
            Path(log.name).unlink()
            return True
        time.sleep(0.2)
    return False


def _wait_for_machines(machine: Machine) -> bool:
    """Wait until all machines are part of the cluster, and log every 30 s how many are."""
    joined = session.start_or_join(log_to_driver=False)
    import ray

    try:
        begin, last_message = time.monotonic(), 0.0
        while True:
            alive = sum(bool(node["Alive"]) for node in ray.nodes())
            waited = time.monotonic() - begin
            if alive >= machine.num_nodes:
                _say(f"{alive} of {machine.num_nodes} machines are here")
                return True
            if waited > machine.timeout_s:
                _say(f"only {alive} of {machine.num_nodes} machines came in {machine.timeout_s:.0f} s")
                return False
            if waited - last_message >= 30:
                last_message = waited
                _say(f"{alive} of {machine.num_nodes} machines are here after {waited:.0f} s")
            time.sleep(1)
    finally:
        joined.stop()


def _wait_until_gone(machine: Machine, ray_node: subprocess.Popen[bytes], after_s: float = HEAD_GONE_S) -> None:
    """Wait until this machine's Ray ends, or the head's port was closed for `after_s` (Ray itself takes 60 s)."""
    last_seen = time.monotonic()
    while ray_node.poll() is None and time.monotonic() - last_seen < after_s:
        time.sleep(1)
        if _answers(machine.head, machine.port):
            last_seen = time.monotonic()


def _stop(ray_node: subprocess.Popen[bytes]) -> None:
    """End `ray start --block`, which ends what it started."""
    if ray_node.poll() is not None:
        return
    ray_node.terminate()
    try:
        ray_node.wait(STOP_RAY_S)
    except subprocess.TimeoutExpired:
        os.killpg(ray_node.pid, signal.SIGKILL)


def _say(sentence: str, code: int = 0) -> int:
    print(f"nodes: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
