"""The README fits on two pages, its links lead somewhere, its commands parse, and its own data trains."""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tandem
from cluster import cli
from cluster.prepare import corpus_changes
from tests.docs.samples import ROOT, samples
from tests.end_to_end.command import Command

README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / name for name in ("start.md", "data.md", "results.md"))]
SMALL = (
    *("encoder.name=", "generator.name=", "generator.kind=copy"),  # fresh models instead of ones that are downloaded
    *("encoder.fresh.num_layers=1", "encoder.fresh.hidden=32", "encoder.fresh.num_heads=2"),
    *("generator.fresh.num_encoder_layers=1", "generator.fresh.hidden=32", "generator.fresh.num_heads=2"),
    *("encoder.fresh.intermediate=64", "generator.fresh.intermediate=64", "encoder.tokenizer.vocabulary=400"),
    *("training.steps=4", "training.batch_size=2", "monitor.wandb=off"),
)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """Commands `./launch.sh VERB` and `tandem VERB` of the fences of a page, each as one line without its comment."""
    fences = re.findall(r"^```(?:bash|text)\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r" *\\\n *", " ", "\n".join(fences)).splitlines()
    found = [re.search(r"(?:\./launch\.sh|^tandem) ([a-z]+\b.*)", line) for line in lines]
    return [match.group(1).split("  #")[0].strip() for match in found if match]


def words(command: str) -> list[str]:
    """Words of a command as a shell splits them."""
    return shlex.split(re.sub(r" {2,}\S.*", "", command))  # what stands two spaces behind explains it


def test_it_fits_on_two_pages():
    assert len(text(README).splitlines()) <= 150
    assert len(text(README).split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_results_lead_to_files(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text(page))
    for target, anchor in links:
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), target
        if anchor and path.suffix == ".md":
            assert anchor[1:] in anchors(path), f"{target}{anchor}"
    for name in re.findall(r"benchmarks/results/[\w.-]+\.md", text(page)):
        assert (ROOT / name).is_file(), name


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(samples(README)["mine.yaml"], encoding="utf-8")
    for run in ("runs/quickstart/joint", "runs/mine", "RUN"):  # as folders of finished runs
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("", encoding="utf-8")
    for name in ("new.jsonl", "changed.jsonl", "ids.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    for command in commands(page):
        verb, *rest = words(command)
        assert verb in cli.VERBS, command
        if verb == "corpus":
            corpus_changes.parse(rest)
        elif verb == "ask":
            assert cli.read_experiment(cli.split_questions(rest)[1])
        elif verb != "test":
            assert cli.read_experiment([word for word in rest if word not in ("--json", "CONFIG")]), command


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "start.md"], ids=lambda page: page.name)
def test_python_samples_name_what_there_is(page: Path):
    (sample,) = re.findall(r"^```python\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL)
    run = tandem.Run(ROOT / "runs" / "none", tandem.Settings())  # reads nothing before it is asked
    named = {"tandem": set(tandem.__all__), "run": set(dir(run))}
    named |= {"answer": {entry.name for entry in fields(tandem.Answer)}}
    named |= {"passage": {entry.name for entry in fields(tandem.Passage)}}
    for node in ast.walk(ast.parse(sample)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr in named[node.value.id], ast.unparse(node)


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
