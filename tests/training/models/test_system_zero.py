"""The real system under ZeRO 0 to 3 on two gloo ranks, against one process with plain autograd and torch's AdamW."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import spawn
from training.engine import engine_setup
from training.engine.engine import Engine
from training.models.build import build_system, parameter_groups
from training.models.model_inputs import ContrastBatch, RetrievalBatch
from training.models.parts.weights import from_numpy, to_numpy
from training.models.system import Answers, System
from training.models.text.packing import pad_rows
from training.models.text.tokenizers import load_tokenizer, train_wordpiece
from training.objectives.dispatch import compute, needs
from training.training_settings import (
    DecodingConfig,
    EncoderConfig,
    EngineConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    TokenizerConfig,
)

pytestmark = pytest.mark.long

STAGES = (0, 1, 2, 3)
STEPS, QUESTIONS, K = 2, 4, 3
NORMS = 3e-4  # relative: sums in another order, and the second step starts from the first one's rounding
RATES = {"retriever": 0.01, "generator": 0.02}
# Adam divides by a gradient's own size: a large epsilon keeps what is nothing but rounding from becoming a step.
ENGINE = EngineConfig(clip_norm=1.0, epsilon=1e-3)
ENCODER = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32), max_passage_tokens=16
)
FRESH = FreshGeneratorConfig(num_encoder_layers=1, num_decoder_layers=1, hidden=16, num_heads=2, intermediate=32)
DECODINGS = (DecodingConfig("marginal", 1, 7), DecodingConfig("marginal", 3, 7), DecodingConfig("fused", 2, 7))


@dataclass(frozen=True)
class Case:
    """A generator, towers and an objective, with the pairs of a contrastive task beside it where `pairs` is set."""

    kind: str
    towers: str
    objective: ObjectiveConfig
    pairs: bool = False


CASES = {
    "copy, shared towers, rag_sequence": Case("copy", "shared", ObjectiveConfig(name="rag_sequence")),
    "copy, separate towers, pdist": Case("copy", "separate", ObjectiveConfig(name="pdist")),
    "copy, separate towers, fused with score bias": Case("copy", "separate", ObjectiveConfig(name="fused")),
    "fusion, separate towers, rag_sequence": Case("fusion", "separate", ObjectiveConfig(name="rag_sequence")),
    "fusion, shared towers, pdist": Case("fusion", "shared", ObjectiveConfig(name="pdist")),
    "fusion, shared towers, fused with score bias": Case("fusion", "shared", ObjectiveConfig(name="fused")),
    "copy, shared towers, realm": Case("copy", "shared", ObjectiveConfig(name="realm")),
    "copy, separate towers, loop": Case("copy", "separate", ObjectiveConfig(name="loop")),
    "copy, shared towers, adist": Case("copy", "shared", ObjectiveConfig(name="adist")),
    "fusion, separate towers, realm": Case("fusion", "separate", ObjectiveConfig(name="realm")),
    "fusion, shared towers, loop": Case("fusion", "shared", ObjectiveConfig(name="loop")),
    "fusion, separate towers, adist": Case("fusion", "separate", ObjectiveConfig(name="adist")),
    "causal, shared towers, realm": Case("causal", "shared", ObjectiveConfig(name="realm")),
    "causal, separate towers, loop": Case("causal", "separate", ObjectiveConfig(name="loop")),
    "causal, shared towers, adist": Case("causal", "shared", ObjectiveConfig(name="adist")),
    "causal, shared towers, rag_sequence": Case("causal", "shared", ObjectiveConfig(name="rag_sequence")),
    "causal, separate towers, pdist": Case("causal", "separate", ObjectiveConfig(name="pdist")),
    "copy, shared towers, rag_sequence and pairs": Case(
        "copy", "shared", ObjectiveConfig(name="rag_sequence"), pairs=True
    ),
    "causal, separate towers, pdist and pairs": Case("causal", "separate", ObjectiveConfig(name="pdist"), pairs=True),
}
KINDS = ("copy", "fusion", "causal")


# ---------------------------------------------------------------- what every process makes in the same way


def make(case: Case, tokenizer: Path) -> System:
    words = load_tokenizer(tokenizer)
    generator = GeneratorConfig(kind=case.kind, fresh=FRESH, max_passage_tokens=16, max_answer_tokens=8)
    return build_system(
        replace(ENCODER, towers=case.towers),
        generator,
        train="both",
        tokenizers=(words, words),
        seed=5,
        objective=case.objective,
    )


def collate(system: System, step: int, part: slice, pairs: bool = False) -> RetrievalBatch:
    """Questions `part` of batch `step`; lengths differ, and the second question has a passage less. With `pairs`, spans
    and their passages beside them."""
    random = np.random.default_rng(step)

    def row(shortest: int, longest: int) -> np.ndarray:
        return random.integers(10, 100, random.integers(shortest, longest + 1))

    questions = [row(2, 5) for _ in range(QUESTIONS)]
    passages = [[row(1, 12) for _ in range(K - (i == 1))] for i in range(QUESTIONS)]
    answers = [row(length, length) for length in (1, 2, 4, 3)]
    padded = [[*rows, *[np.array([0])] * (K - len(rows))] for rows in passages]
    flat = [one for rows in padded[part] for one in rows]
    reader = system.generator.collate(questions[part], passages[part], answers[part])
    batch = RetrievalBatch(*pad_rows(questions[part], 0), *pad_rows(flat, 0), reader)
    if not pairs:
        return batch
    spans, whole = [row(2, 4) for _ in range(QUESTIONS)], [row(6, 12) for _ in range(QUESTIONS)]
    numbers = torch.arange(QUESTIONS)[part]
    contrast = ContrastBatch(*pad_rows(spans[part], 0), *pad_rows(whole[part], 0), numbers)
    return replace(batch, contrast=contrast, contrast_share=0.3)


def loss_of(case: Case, outputs: Any) -> torch.Tensor:
    return compute(case.objective, outputs)[0]


def share(rank: int, world_size: int) -> slice:
    size = QUESTIONS // world_size
    return slice(rank * size, (rank + 1) * size)


# ---------------------------------------------------------------- two ranks


def measure(rank: int, world_size: int, tokenizer: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the tests compare."""
    engine_setup.PERSISTENT_ELEMENTS = 0  # otherwise ZeRO 3 would keep models of this size whole
    found: dict[str, Any] = {}
    for stage in STAGES:
        for name, case in CASES.items():
            found[f"{name}, {stage}"] = train(rank, world_size, stage, case, tokenizer)
    for kind in KINDS:
        found[f"{kind} writes"] = write(rank, world_size, kind, tokenizer, trained[kind])
    return found


def train(rank: int, world_size: int, stage: int, case: Case, tokenizer: Path) -> dict[str, Any]:
    system = make(case, tokenizer)
    engine = Engine(system, replace(ENGINE, zero_stage=stage), parameter_groups(system))
    losses, norms = [], []
    for step in range(STEPS):
        batch = collate(system, step, share(rank, world_size), case.pairs)
        loss = loss_of(case, engine(System.likelihoods, batch, needs(case.objective), 1.0))
        engine.backward(loss)
        losses.append(loss.item())
        norms.append(engine.step(RATES).grad_norm)
    return {
        "losses": losses,
        "norms": norms,
        "weights": to_numpy(engine.consolidated_state()),
        "passage_encoder": to_numpy(engine.consolidated_state("retriever.passage_encoder")),
    }


def write(rank: int, world_size: int, kind: str, tokenizer: Path, weights: dict[str, np.ndarray]) -> list[Any]:
    """Answers of this rank's questions under ZeRO 3, by trained weights."""
    system = make(Case(kind, "shared", ObjectiveConfig()), tokenizer)
    engine = Engine(system, replace(ENGINE, zero_stage=3), parameter_groups(system))
    engine.load_consolidated(from_numpy(weights))
    system.eval()
    return [answers(engine, collate(system, 0, share(rank, world_size)), decoding) for decoding in DECODINGS]


def answers(system: Any, batch: RetrievalBatch, decoding: DecodingConfig) -> tuple[list[list[int]], list[float]]:
    with torch.no_grad():
        written: Answers = system.answer(batch, decoding, 1.0, False)
    return written.decoded.tokens, written.decoded.log_probs.tolist()


# ---------------------------------------------------------------- one process


def reference(case: Case, tokenizer: Path) -> dict[str, Any]:
    """Whole batches, plain autograd, torch's AdamW, each group clipped on its own."""
    system = make(case, tokenizer).train()
    groups = parameter_groups(system)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "lr": RATES[name]} for name, parameters in groups.items()],
        betas=(ENGINE.beta1, ENGINE.beta2),
        eps=ENGINE.epsilon,
        weight_decay=0.0,
    )
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(
            case, system.likelihoods(collate(system, step, slice(None), case.pairs), needs(case.objective), 1.0)
        )
        loss.backward()
        clipped = {name: torch.nn.utils.clip_grad_norm_(group, ENGINE.clip_norm) for name, group in groups.items()}
        norms.append({name: float(norm) for name, norm in clipped.items()})
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": {k: v.clone() for k, v in system.state_dict().items()}}


def memorise(kind: str, tokenizer: Path) -> tuple[System, dict[str, np.ndarray]]:
    """A system that writes the answers of batch 0, which differ in length, and its weights."""
    case = Case(kind, "shared", ObjectiveConfig(name="rag_sequence"))
    system = make(case, tokenizer)
    batch = collate(system, 0, slice(None))
    optimizer = torch.optim.Adam(system.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(case, system.likelihoods(batch, needs(case.objective), 1.0)).backward()
        optimizer.step()
    return system.eval(), to_numpy(system.state_dict())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved once: its trainer is not deterministic."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def memorised(tokenizer: Path) -> dict[str, tuple[System, dict[str, np.ndarray]]]:
    return {kind: memorise(kind, tokenizer) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(tokenizer: Path, memorised: dict[str, Any]) -> list[dict[str, Any]]:
    """What the two ranks measured, all in one start."""
    return spawn(measure, 2, tokenizer, {kind: weights for kind, (_, weights) in memorised.items()}, timeout_s=240)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, ranks: list[dict[str, Any]], tokenizer: Path) -> None:
    expected = reference(CASES[name], tokenizer)
    for stage in STAGES:
        both = [rank[f"{name}, {stage}"] for rank in ranks]
        means = np.mean([found["losses"] for found in both], axis=0)
        np.testing.assert_allclose(means, expected["losses"], rtol=2e-5, err_msg=f"losses, stage {stage}")
        for step, norms in enumerate(expected["norms"]):
            for group, norm in norms.items():
                assert both[0]["norms"][step][group] == pytest.approx(norm, rel=NORMS), (stage, step, group)
                assert both[1]["norms"][step][group] == pytest.approx(norm, rel=NORMS), (stage, step, group)
        compare(both[0]["weights"], expected["weights"], f"stage {stage}")
        assert not both[1]["weights"]


@pytest.mark.parametrize("name", CASES)
def test_published_passage_encoder_equals_one_process(name: str, ranks: list[dict[str, Any]], tokenizer: Path) -> None:
    prefix = "retriever.passage_encoder."
    weights = reference(CASES[name], tokenizer)["weights"]
    expected = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    untrained = make(CASES[name], tokenizer).state_dict()
    for stage in STAGES:
        found = ranks[0][f"{name}, {stage}"]["passage_encoder"]
        assert found.keys() == expected.keys()
        compare(found, expected, f"stage {stage}")
        assert any(not np.array_equal(found[key], untrained[prefix + key].numpy()) for key in found)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_whose_answers_differ_in_length_write_what_one_process_writes(
    kind: str, ranks: list[dict[str, Any]], memorised: dict[str, tuple[System, Any]]
) -> None:
    """Under ZeRO 3 every step of writing is a collective: a rank that is done earlier must go on."""
    system, _ = memorised[kind]
    longest = []
    for number, decoding in enumerate(DECODINGS):
        for rank, found in enumerate(ranks):
            tokens, log_probs = answers(system, collate(system, 0, share(rank, len(ranks))), decoding)
            assert found[f"{kind} writes"][number][0] == tokens
            np.testing.assert_allclose(found[f"{kind} writes"][number][1], log_probs, rtol=1e-4, atol=1e-5)
            longest.append(max(len(row) for row in tokens))
    assert longest[0] != longest[1]  # otherwise this proves nothing


def compare(found: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Weights by name, one step being about 0.01; what is shared may stand under one name only."""
    assert set(found) <= set(expected)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-3, atol=2e-5, err_msg=f"{name}, {what}")
