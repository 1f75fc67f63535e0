"""The README fits on two pages, and its own data trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.samples import ROOT, samples
from tests.end_to_end.command import Command

README = ROOT / "README.md"
SMALL = (
    *("encoder.name=", "generator.name=", "generator.kind=copy"),  # fresh models instead of ones that are downloaded
    *("encoder.fresh.num_layers=1", "encoder.fresh.hidden=32", "encoder.fresh.num_heads=2"),
    *("generator.fresh.num_encoder_layers=1", "generator.fresh.hidden=32", "generator.fresh.num_heads=2"),
    *("encoder.fresh.intermediate=64", "generator.fresh.intermediate=64", "encoder.tokenizer.vocabulary=400"),
    *("training.steps=4", "training.batch_size=2", "monitor.wandb=off"),
)


def test_it_fits_on_two_pages():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


def own_data(folder: Path) -> None:
    """The README's data and configuration; its lines again for more lakes, so that there is something to choose."""
    for name, sample in samples(README).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            line = sample.strip()
            lakes = ((f'"{line[9]}{n}"', f"Lake {n:02}", f"{n},642") for n in range(10, 22))
            others = (
                line.replace(line[8:12], new).replace("Lake Baikal", lake).replace("1,642", deep)
                for new, lake, deep in lakes
            )
            sample = "".join(f"{row}\n" for row in (line, *others))
        path.write_text(sample, encoding="utf-8")


def test_its_own_data_is_prepared(tmp_path: Path):
    own_data(tmp_path)
    assert len(samples(README)["mine.yaml"].splitlines()) == 10
    assert all(json.loads(line) for line in (tmp_path / "data" / "corpus.jsonl").read_text().splitlines())
    command = [sys.executable, "-P", "-m", "cluster.cli", "prepare", "mine.yaml", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passages tokenised" in done.stdout
    for split in ("train", "test"):
        assert f"13 questions of split {split} tokenised" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_its_own_data_trains_and_answers(tmp_path: Path):
    own_data(tmp_path)
    places = (f"corpus.path={tmp_path / 'data'}", f"run.directory={tmp_path / 'runs'}")
    settings = (str(tmp_path / "mine.yaml"), *SMALL, *places)
    with Command("train", *settings, log=tmp_path / "train.log") as training:
        assert training.wait(900) == 0, training.printed
    assert "step 4/4" in training.printed
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()
    with Command("ask", "How deep is Lake Baikal?", *settings, log=tmp_path / "ask.log") as asking:
        assert asking.wait(240) == 0, asking.printed
    assert "Lake" in asking.printed
