"""Where a machine stands in a job is read from the environment; the token is private and complete when it appears."""

import socket
from pathlib import Path

import pytest

from cluster import nodes

GOOD = {"TANDEM_HEAD": "10.0.0.1:6379", "TANDEM_NODES": "4", "TANDEM_NODE_RANK": "2"}


def test_reads_the_place_of_a_machine() -> None:
    machine = nodes.from_environment({**GOOD, "TANDEM_NODES_TIMEOUT_S": "20"})
    assert (machine.head, machine.port, machine.num_nodes, machine.rank) == ("10.0.0.1", 6379, 4, 2)
    assert machine.timeout_s == 20
    assert machine.token_file == Path("runs/.token-10-0-0-1-6379").resolve()
    assert nodes.from_environment({**GOOD, "SLURM_JOB_ID": "77"}).token_file.name == ".token-77"
    assert nodes.from_environment({**GOOD, "TANDEM_TOKEN_FILE": "/x/token"}).token_file == Path("/x/token")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TANDEM_HEAD", ""),
        ("TANDEM_HEAD", "host"),
        ("TANDEM_HEAD", "host:"),
        ("TANDEM_NODES", "0"),
        ("TANDEM_NODES", "many"),
        ("TANDEM_NODE_RANK", "4"),
        ("TANDEM_NODE_RANK", ""),
        ("TANDEM_NODES_TIMEOUT_S", "-1"),
    ],
)
def test_refuses_a_place_that_cannot_be(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        nodes.from_environment({**GOOD, name: value})


def test_token_is_private_and_made_once(tmp_path: Path) -> None:
    token = tmp_path / "runs" / ".token"
    assert nodes._make_token(token)
    assert token.stat().st_mode & 0o777 == 0o600
    text = token.read_text(encoding="utf-8")
    assert len(text) == 64
    assert not nodes._make_token(token)
    assert token.read_text(encoding="utf-8") == text
    assert [path.name for path in token.parent.iterdir()] == [".token"]


def test_mistake_in_the_command_is_answered_before_any_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert nodes.main(["train", "nowhere.yaml"]) == 2
    assert "no configuration file nowhere.yaml" in capsys.readouterr().err


def test_machine_that_finds_no_head_fails_in_bounded_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = nodes.Machine(
        head="127.0.0.1", port=port, num_nodes=2, rank=1, token_file=tmp_path / "token", timeout_s=0.5
    )
    assert nodes._follower(machine) == 1
    assert "TANDEM_TOKEN_FILE" in capsys.readouterr().err
