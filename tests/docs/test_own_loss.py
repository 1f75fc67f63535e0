"""The loss that docs/objectives.md shows is one that the project takes."""

import re
from pathlib import Path

import pytest
import torch

from docs.generate import random_likelihoods
from training.objectives.dispatch import compute, needs
from training.training_settings import ObjectiveConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_sample_loss_is_computed_and_has_gradients(tmp_path: Path):
    sample = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "loss.py").write_text(sample[0], encoding="utf-8")
    config = ObjectiveConfig(name="rag_sequence", function=f"{tmp_path / 'loss.py'}:entropy_penalty")
    outputs = random_likelihoods(needs(config), each=3)
    loss, stats = compute(config, outputs)
    loss.backward()
    assert outputs.per_passage is not None
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in (outputs.scores, outputs.per_passage))
    plain, _ = compute(ObjectiveConfig(name="rag_sequence"), random_likelihoods(needs(config), each=3))
    entropy = stats["objective/entropy"]
    assert float(loss.detach() - plain.detach()) == pytest.approx(0.01 * float(entropy), rel=1e-3)
    assert torch.isfinite(entropy)
