"""The joint step without Ray, as the documentation shows it: it learns, and it stays small."""

import ast
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from training.models.retriever.encoder import build_retriever

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "joint_step.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("joint_step", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["joint_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_one_loss_gives_both_towers_and_the_generator_a_gradient(example: ModuleType, tmp_path: Path) -> None:
    data, (shared, generator) = example.prepare(tmp_path / "world")
    vocabulary = shared.query_encoder.backbone.config.vocab_size
    retriever = build_retriever(replace(example.ENCODER, towers="separate"), "both", vocabulary)
    index = example.encode(retriever.passage_encoder, data.passages)
    loss, _ = example.joint_loss(data, np.arange(8), index, models=(retriever, generator))
    loss.backward()
    for part in (retriever.query_encoder, retriever.passage_encoder, generator):
        norms = [float(p.grad.norm()) for p in part.parameters() if p.grad is not None]
        assert np.isfinite(norms).all()
        assert max(norms) > 0


def test_the_loss_falls_and_the_right_passage_comes_first() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    losses, recalls = [float(row[3]) for row in rows], [float(row[5]) for row in rows]
    assert len(rows) == 5
    assert losses[-1] < losses[0] / 3  # 17.0 to 1.4
    assert recalls[-1] > 0.5 > 0.2 > recalls[0]  # .02 to .80


def test_it_imports_neither_ray_nor_the_cluster_and_is_short() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"indexing", "training", "numpy", "torch"}
    assert len(text.splitlines()) <= 150
