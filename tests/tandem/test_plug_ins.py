"""An objective and a metric of the user's own train and measure a real stage; a wrong one is refused by name, before
any model loads."""

import json
import shutil
from pathlib import Path

import pytest
from torch import Tensor

import tandem
from cluster.config.experiment import load
from cluster.config.preflight import check_models, with_absolute_models
from indexing.indexing_settings import CorpusConfig, WorldConfig
from tests.tandem.conftest import train_tiny
from training.metrics import exact_match
from training.objectives.inputs import Likelihoods, retrieval_log_probs
from training.objectives.marginal import rag_sequence
from training.training_settings import DecodingConfig, EvaluationConfig, ObjectiveConfig

HERE = "tests.tandem.test_plug_ins"
WORLD = CorpusConfig(world=WorldConfig(num_people=30, num_values=20))
CODE = """
def share_of_empty(predictions, golds):
    assert len(predictions) == len(golds)
    return sum(not prediction for prediction in predictions) / len(predictions)
def one(predictions):
    return 1.0
f1 = share_of_empty
number = 7
"""


def marginal(outputs: Likelihoods, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of rag_sequence, and a metric of its own."""
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    return rag_sequence(outputs, temperature)[0], {"best": prior.max(dim=1).values.mean()}


def no_tuple(outputs: Likelihoods, temperature: float) -> Tensor:
    return rag_sequence(outputs, temperature)[0]


def rightly(predictions: list[str], golds: list[list[str]]) -> float:
    return sum(exact_match(one, some) for one, some in zip(predictions, golds, strict=True)) / len(golds)


def test_a_loss_and_metrics_of_the_users_own(trained: Path, tmp_path: Path) -> None:
    """The same loss under another name gives the same run; metrics stand beside the others, of every mode."""
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    evaluation = EvaluationConfig(
        decoding=DecodingConfig(max_tokens=4),
        also=["closed_book"],
        metrics=[f"{HERE}:rightly", f"{file}:share_of_empty"],
    )
    # Training a tokeniser again may break ties in another order.
    shutil.copytree(trained.parent / "tokenizers", tmp_path / "tiny" / "tokenizers")
    folder = train_tiny(tmp_path, WORLD, objective=ObjectiveConfig(function=f"{HERE}:marginal"), evaluation=evaluation)
    losses = [losses_of(run) for run in (folder, trained)]
    assert losses[0] == losses[1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["objective/best"] < 0 for row in rows if "loss/total" in row)
    results = tandem.load(folder).results()
    assert results.metrics["rightly"] == results.metrics["exact_match"]
    assert 0 <= results.metrics["closed_book/share_of_empty"] <= 1
    assert "eval/test/rightly" in rows[-1]


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.function=nowhere:loss", r"objective\.function=nowhere:loss: .*ModuleNotFoundError"),
        ("objective.function=nowhere.py:loss", r"objective\.function=.*nowhere\.py does not exist"),
        ("objective.function=loss", r"objective\.function=loss: must be module:function or .*outputs: Likelihoods"),
        (f"objective.function={HERE}:loss", r"has no 'loss'; wanted is \(outputs: Likelihoods, temperature: float\)"),
        (f"objective.function={HERE}:HERE", "has no 'HERE'"),
        (f"objective.function={HERE}:losses_of", r"must have the signature \(outputs: Likelihoods.*too many"),
        ("evaluation.metrics=[FILE:one]", r"must have the signature \(predictions: Sequence\[str\], golds: "),
        ("evaluation.metrics=[FILE:number]", "has no 'number'"),
        ("evaluation.metrics=[FILE:f1]", "must have a function name that no other metric has, but f1 is taken"),
        (f"evaluation.metrics=[{HERE}:rightly,{HERE}:rightly]", "but rightly is taken"),
    ],
)
def test_wrong_ones_are_refused_with_the_signature_wanted(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    settings = load(["configs/quickstart.yaml"], [override.replace("FILE", str(file))]).settings
    with pytest.raises(ValueError, match=message):
        check_models(settings)


def test_a_loss_without_metrics_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no_tuple: must return a loss and metrics"):
        train_tiny(tmp_path, WORLD, objective=ObjectiveConfig(function=f"{HERE}:no_tuple"))


def test_files_are_named_by_their_absolute_paths() -> None:
    """Trainers have another working folder."""
    overrides = ["objective.function=a.py:f", "evaluation.metrics=[b.py:g,c:h]", "pretraining.recognizer=d.py:s"]
    settings = with_absolute_models(load(["configs/quickstart.yaml"], overrides).settings)
    assert settings.objective.function == f"{Path('a.py').resolve()}:f"
    assert settings.evaluation.metrics == [f"{Path('b.py').resolve()}:g", "c:h"]
    assert settings.pretraining.recognizer == f"{Path('d.py').resolve()}:s"
