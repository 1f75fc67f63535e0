"""The corpus of a running training is changed from another terminal, and that of a finished one as well."""

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

CONFIG = """
run: {name: live, directory: "DIRECTORY"}
corpus: {world: {num_people: 40, num_values: 40}}
encoder: {fresh: {num_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}, tokenizer: {vocabulary: 600}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}}
retrieval: {k: 3}
refresh: {every_steps: 20}
training: {steps: 400, batch_size: 4}
checkpoint: {every_steps: 100}
evaluation: {k: 20, decoding: {max_tokens: 4}}
monitor: {wandb: off}
"""
FIRST, SECOND = "zebra quagga okapi zebra quagga okapi", "walnut pecan walnut hickory pecan"


def test_a_job_takes_changes_and_what_comes_after_it_knows_them(tmp_path: Path) -> None:
    config, run = tmp_path / "live.yaml", tmp_path / "runs" / "live"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / "runs")), encoding="utf-8")

    def call(*arguments: str) -> str:
        log = tmp_path / "call.log"
        log.unlink(missing_ok=True)
        with Command(*arguments, log=log) as command:
            assert command.wait(200) == 0, command.printed
            return command.printed

    def passages(name: str, id: str, text: str) -> str:
        (tmp_path / name).write_text(json.dumps({"_id": id, "text": text}), encoding="utf-8")
        return str(tmp_path / name)

    def asked(question: str) -> list[str]:
        return re.findall(r"^  \d\.\d{3}  -?\d+\.\d{3}  (\S+)  ", call("ask", question, str(run)), re.MULTILINE)

    def hits(folder: Path) -> set[str]:
        return {id for row in rows(folder / "predictions.jsonl") for id in row["hits"]}

    with Command("train", str(config), log=tmp_path / "train.log") as job:
        job.until(lambda: len(rows(run / "metrics.jsonl")) > 5, 200, "steps")
        printed = call("corpus", "add", str(run), passages("first.jsonl", "first", FIRST))
        expected = r"1 put in, 0 taken away: version 1 of the corpus, 241 passages, generation \d+ serves"
        assert re.search(expected, printed)
        known = [json.loads(line)["_id"] for line in _corpus(run)]
        deleted = known[:2]
        printed = call("corpus", "delete", str(run), *deleted)
        assert "0 put in, 2 taken away: version 2 of the corpus, 239 passages" in printed
        call("corpus", "update", str(run), passages("changed.jsonl", known[2], SECOND))
        assert len(rows(run / "metrics.jsonl")) < 400, "the run is too short for all of its changes"
        assert job.wait(400) == 0, job.printed
    changes = rows(run / "events.jsonl", "corpus_changed")
    committed = [(row["corpus_version"], row["added"]) for row in changes]
    assert committed[0] == (1, 1)  # the next ones a refresh may bring along, or the change after them
    assert committed == [one for one in [(1, 1), (2, 0), (3, 1)] if one in committed]
    assert rows(run / "events.jsonl", "refresh_committed")[-1]["passages"] == 239
    assert not hits(run) & set(deleted)
    assert asked(FIRST)[0] == "first"
    assert asked(SECOND)[0] == known[2]

    # Nobody serves the run any more.
    third = "gneiss basalt gneiss schist"
    assert "no job serves this run" in call("corpus", "add", str(run), passages("third.jsonl", "third", third))
    call("corpus", "delete", str(run), "first")
    assert asked(third)[0] == "third"
    assert "first" not in asked(FIRST)
    call("evaluate", str(run))
    assert hits(run / "evaluate")
    assert not hits(run / "evaluate") & {*deleted, "first"}
    # The saved index is taken over; what was added since is all that is encoded.
    (change,) = rows(run / "evaluate" / "events.jsonl", "corpus_changed")
    assert (change["corpus_version"], change["added"], change["deleted"]) == (5, 1, 1)
    assert not rows(run / "evaluate" / "events.jsonl", "refresh_committed")
    assert "version 5" in call("corpus", "show", str(run))


def _corpus(run: Path) -> list[str]:
    return (run / "world" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
