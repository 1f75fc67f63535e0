"""A tiny run whose trainer and then whose driver are killed: nothing is left behind, and the same command finishes it,
though the index on disk was damaged meanwhile.

`test_survival.py` does this to every actor of a longer run.
"""

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, kill, rows

STEPS = 60
CONFIG = """
run: {name: survive, directory: "DIRECTORY"}
corpus: {world: {num_people: 12, num_values: 12}}
encoder: {fresh: {num_layers: 1, hidden: 16, num_heads: 2, intermediate: 32}, tokenizer: {vocabulary: 300}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 16, num_heads: 2, intermediate: 32}}
retrieval: {k: 2}
refresh: {every_steps: 10}
training: {steps: 60, batch_size: 2}
checkpoint: {every_steps: 10}
evaluation: {k: 5, max_questions: 8, batch_size: 8, decoding: {max_tokens: 2}}
monitor: {wandb: off}
"""


def damage_index(folder: Path) -> None:
    """Flip a bit in the generation that the newest checkpoint names."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    generation = json.loads((newest / "state.json").read_text())["generation"]
    path = next((folder / "index" / f"generation-{generation}").rglob("index.faiss"))
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)


@pytest.mark.timeout(400)
def test_trainer_and_driver_die_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config, log, folder = tmp_path / "survive.yaml", tmp_path / "output.log", tmp_path / "runs" / "survive"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / "runs")), encoding="utf-8")
    events = folder / "events.jsonl"
    with Command("train", str(config), log=log) as command:
        command.until(lambda: rows(events, "checkpoint"), 150, "first checkpoint")
        kill(command.until(lambda: command.descendants("ray::RayTrainWorker"), 60, "trainer")[0])
        command.until(lambda: rows(events, "resumed"), 90, "resumed training")
        assert len(command.marked()) > 5
        command.process.kill()  # the driver
        command.process.wait()
        damage_index(folder)
        with Command("train", str(config), log=log) as again:
            assert again.wait(200) == 0, again.printed
            again.until(lambda: not again.marked(), 30, "end of its processes", must_run=False)
        command.until(lambda: not command.marked(), 90, "end of what the killed driver started", must_run=False)
    assert "differs from its checksum" in rows(events, "snapshot_refused")[-1]["why"]
    resumed = [row["step"] for row in rows(events, "resumed")]
    assert len(resumed) == 2
    assert 10 <= resumed[0] <= resumed[1] < STEPS
    assert json.loads((folder / "evaluation.json").read_text())["step"] == STEPS
    logged = {row["step"] for row in rows(folder / "metrics.jsonl") if "loss/total" in row}
    assert logged == set(range(1, STEPS + 1))
