"""Every command that a page shows is read by the parser that would read it; plans are computed."""

import importlib.util
import re
from pathlib import Path

import pytest

from cluster import cli
from cluster.config.experiment import Experiment
from cluster.config.verbs import VERBS
from cluster.planning import plan
from cluster.prepare import corpus_changes
from tests.docs.pages import PAGES, ROOT, commands
from tests.docs.samples import samples

RUNS = ("runs/quickstart/joint", "runs/mine", "RUN")  # as folders of finished runs
FILES = ("new.jsonl", "changed.jsonl", "ids.txt")
SHOWN = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, the README's own configuration, and the runs and files that pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(samples(ROOT / "README.md")["mine.yaml"], encoding="utf-8")
    for run in RUNS:
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("", encoding="utf-8")
    for name in FILES:
        (tmp_path / name).write_text("", encoding="utf-8")
    return tmp_path


def experiment_of(verb: str, rest: list[str]) -> Experiment:
    """The settings of a verb's arguments. Raises ValueError."""
    if verb == "ask":
        rest = cli.split_questions(rest)[1]
    return cli.read_experiment([word for word in rest if word not in ("--json", "--changed")])


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda part: part.name if isinstance(part, Path) else part[-1])
def test_a_command_is_read(page: Path, words: list[str], project: Path):
    match words:
        case ["./launch.sh"] | ["tandem"]:
            assert experiment_of("train", [])
        case ["./launch.sh" | "tandem" | "launch.sh", "test" | "settings", *_]:
            assert words[1] in VERBS
        case ["./launch.sh" | "tandem" | "launch.sh", "corpus", *rest]:
            corpus_changes.parse(rest)
        case ["./launch.sh" | "tandem", verb, *rest]:
            assert verb in VERBS
            experiment = experiment_of(verb, rest)
            if verb == "plan" and "plan.gpu=cpu" not in rest:  # which would measure this machine
                for name, settings in experiment.stages.items():
                    assert plan.table(plan.plan(settings, experiment.directory, name))
        case ["sbatch", *rest]:
            place = rest.index("launch.sh")
            assert experiment_of(rest[place + 1], rest[place + 2 :])
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["pip", "install", "-e", what]:
            assert re.fullmatch(r"\.\[(cpu|gpu)(,dev)?\]", what)
        case _:
            pytest.fail(f"{page.name} shows a command that no parser here reads: {' '.join(words)}")


def test_the_plan_that_is_shown_is_the_plan_that_is_computed(project: Path):
    page = ROOT / "docs" / "scaling.md"
    words = next(words for words in commands(page) if "plan.passages=21015324" in words)
    experiment = experiment_of("plan", words[2:])
    shown = re.findall(r"^```text\n(stage .*?)```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert plan.table(plan.plan(experiment.settings, experiment.directory)) == shown[0].rstrip("\n")


def test_there_are_commands_to_check():
    assert len(SHOWN) > 20
    assert sum("plan" in words for _, words in SHOWN) >= 2
