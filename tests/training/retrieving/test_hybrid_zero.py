"""The lexical weight and the re-ranker under ZeRO 0 to 3 on two gloo ranks, against one process with plain autograd."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import spawn
from tests.training.models.test_system_zero import (
    ENCODER,
    ENGINE,
    FRESH,
    QUESTIONS,
    RATES,
    STEPS,
    K,
    compare,
    share,
    tokenizer,
)
from training.engine import engine_setup
from training.engine.engine import Engine
from training.models.build import LEXICAL_WEIGHT, build_system, parameter_groups
from training.models.model_inputs import RetrievalBatch
from training.models.parts.weights import from_numpy, to_numpy
from training.models.system import System
from training.models.text.packing import pad_rows
from training.models.text.pairs import Pairing
from training.models.text.tokenizers import load_tokenizer
from training.objectives.dispatch import compute, needs
from training.training_settings import (
    FreshEncoderConfig,
    GeneratorConfig,
    ObjectiveConfig,
    RerankerConfig,
    RetrievalConfig,
)

__all__ = ["tokenizer"]  # the fixture

pytestmark = pytest.mark.long

STAGES = (0, 2, 3)
OBJECTIVE = ObjectiveConfig(name="rag_sequence")
SMALL = FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32)
CASES = {
    "weight": (RetrievalConfig(hybrid="learned"), RerankerConfig()),
    "weight and re-ranker": (RetrievalConfig(hybrid="learned"), RerankerConfig(mode="add", fresh=SMALL)),
    "re-ranker alone": (RetrievalConfig(), RerankerConfig(mode="replace", fresh=SMALL)),
}


def make(name: str, folder: Path) -> System:
    words = load_tokenizer(folder)
    generator = GeneratorConfig(kind="copy", fresh=FRESH, max_passage_tokens=16, max_answer_tokens=8)
    encoder = replace(ENCODER, max_question_tokens=8)
    retrieval, reranker = CASES[name]
    return build_system(
        encoder,
        generator,
        train="both",
        tokenizers=(words, words),
        seed=5,
        objective=OBJECTIVE,
        retrieval=retrieval,
        reranker=reranker,
    )


def collate(system: System, step: int, part: slice) -> RetrievalBatch:
    """Questions `part` of batch `step`; lengths differ, and the second question has a passage less."""
    random = np.random.default_rng(step)

    def row(shortest: int, longest: int) -> np.ndarray:
        return random.integers(10, 100, random.integers(shortest, longest + 1))

    questions = [row(2, 5) for _ in range(QUESTIONS)]
    passages = [[row(1, 12) for _ in range(K - (i == 1))] for i in range(QUESTIONS)]
    answers = [row(length, length) for length in (1, 2, 4, 3)]
    lexical = torch.from_numpy(random.random((QUESTIONS, K)).astype(np.float32))
    flat = [one for rows in passages[part] for one in [*rows, *[np.array([0])] * (K - len(rows))]]
    reader = system.generator.collate(questions[part], passages[part], answers[part])
    pairs = Pairing(side="retriever", pad_id=0)(questions[part], passages[part], K)
    ids = *pad_rows(questions[part], 0), *pad_rows(flat, 0)
    return RetrievalBatch(*ids, reader, lexical=lexical[part], pairs=pairs)


def measure(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    engine_setup.PERSISTENT_ELEMENTS = 0  # otherwise ZeRO 3 would keep models of this size whole
    return {f"{name}, {stage}": train(rank, world_size, stage, name, folder) for stage in STAGES for name in CASES}


def train(rank: int, world_size: int, stage: int, name: str, folder: Path) -> dict[str, Any]:
    system = make(name, folder)
    engine = Engine(system, replace(ENGINE, zero_stage=stage), parameter_groups(system))
    losses: list[float] = []
    weights: list[float] = []
    for step in range(STEPS):
        batch = collate(system, step, share(rank, world_size))
        with torch.no_grad():
            engine(System.scores, batch)  # as candidates are chosen before they are scored with gradient
            if system.retriever.lexical is not None:
                weights.append(float(engine(System.lexical_weight)))
        loss = compute(OBJECTIVE, engine(System.likelihoods, batch, needs(OBJECTIVE), 1.0))[0]
        engine.backward(loss)
        losses.append(loss.item())
        engine.step(RATES)
    trained = to_numpy(engine.consolidated_state())
    engine.load_consolidated(from_numpy(trained) if rank == 0 else {})
    again = to_numpy(engine.consolidated_state())
    same = all(np.array_equal(again[key], value) for key, value in trained.items())
    return {"losses": losses, "weights": trained, "lexical": weights, "same": same}


def reference(name: str, folder: Path) -> dict[str, Any]:
    """Whole batches, plain autograd, torch's AdamW, each group clipped on its own."""
    system = make(name, folder).train()
    groups = parameter_groups(system)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "lr": RATES[group]} for group, parameters in groups.items()],
        betas=(ENGINE.beta1, ENGINE.beta2),
        eps=ENGINE.epsilon,
        weight_decay=0.0,
    )
    losses: list[float] = []
    weights: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if system.retriever.lexical is not None:
            weights.append(system.retriever.lexical(torch.ones(1)).item())
        outputs = system.likelihoods(collate(system, step, slice(None)), needs(OBJECTIVE), 1.0)
        loss = compute(OBJECTIVE, outputs)[0]
        loss.backward()
        for group in groups.values():
            torch.nn.utils.clip_grad_norm_(group, ENGINE.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": {k: v.clone() for k, v in system.state_dict().items()}, "lexical": weights}


@pytest.fixture(scope="module")
def ranks(tokenizer: Path) -> list[dict[str, Any]]:
    """What the two ranks measured, all in one start."""
    return spawn(measure, 2, tokenizer, timeout_s=240)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, ranks: list[dict[str, Any]], tokenizer: Path) -> None:
    expected = reference(name, tokenizer)
    untrained = make(name, tokenizer).state_dict()
    for stage in STAGES:
        both = [rank[f"{name}, {stage}"] for rank in ranks]
        means = np.mean([found["losses"] for found in both], axis=0)
        np.testing.assert_allclose(means, expected["losses"], rtol=2e-5, err_msg=f"losses, stage {stage}")
        np.testing.assert_allclose(both[0]["lexical"], expected["lexical"], rtol=1e-4)
        assert both[0]["lexical"] == both[1]["lexical"]
        compare(both[0]["weights"], expected["weights"], f"stage {stage}")
        assert both[0]["same"]
        moved = [key for key, value in both[0]["weights"].items() if not np.array_equal(value, untrained[key].numpy())]
        assert (LEXICAL_WEIGHT in moved) == ("weight" in name)
        assert any(key.startswith("reranker.") for key in moved) == ("re-ranker" in name)
        assert any(key.startswith("retriever.query") for key in moved) == (name != "re-ranker alone")
