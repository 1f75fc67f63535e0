"""Every family of generator, LoRA, chunked loss and gradient caching under ZeRO 2 and 3 on two gloo ranks, against one
process with plain autograd, whole logits and all activations kept."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import spawn
from tests.helpers.families import CAUSAL, COPY, FUSION, generator_config, write_families, write_tokenizer
from training.engine import engine_setup
from training.engine.engine import Engine
from training.models.build import build_system, parameter_groups
from training.models.generators import head
from training.models.model_inputs import RetrievalBatch
from training.models.parts.adapters import adapters_disabled, merged
from training.models.parts.weights import to_numpy
from training.models.system import System
from training.models.text.packing import pad_rows
from training.models.text.tokenizers import load_tokenizer
from training.objectives.dispatch import compute, needs
from training.training_settings import EncoderConfig, EngineConfig, FreshEncoderConfig, LoraConfig, ObjectiveConfig

pytestmark = pytest.mark.long

STAGES = (2, 3)
STEPS, QUESTIONS, K = 2, 4, 3
RATES = {"retriever": 0.01, "generator": 0.01}
# Adam divides by a gradient's own size: a large epsilon keeps what is nothing but rounding from becoming a step.
ENGINE = EngineConfig(clip_norm=1.0, epsilon=1e-2)
ENCODER = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32), max_passage_tokens=16
)
LORA = LoraConfig(rank=2, alpha=8.0)


@dataclass(frozen=True)
class Case:
    """A generator, an objective, and what may change time and memory but no number."""

    family: str
    objective: str = "rag_sequence"
    lora: bool = False
    savings: dict[str, Any] = field(default_factory=dict)  # of memory, on the ranks only


SAVINGS = {"loss_chunk_tokens": 3, "gradient_cache_passages": 2}
CASES = {family: Case(family, "pdist" if family in ("t5", "qwen2", "mamba2") else "rag_sequence")
         for family in FUSION + CAUSAL + COPY}  # fmt: skip
CASES |= {
    "t5 in chunks": Case("t5", savings=SAVINGS),
    "bart in chunks": Case("bart", "pdist", savings=SAVINGS),
    "llama in chunks": Case("llama", "pdist", savings=SAVINGS),
    "gemma2 in chunks": Case("gemma2", savings=SAVINGS),
    "mamba in chunks": Case("mamba", savings=SAVINGS),
    "t5 with adapters": Case("t5", lora=True),
    "gpt2 with adapters": Case("gpt2", lora=True),
    "llama with adapters, in chunks": Case("llama", lora=True, savings=SAVINGS),
    "bert in chunks": Case("bert", "pdist", savings=SAVINGS),
    "jamba with adapters": Case("jamba", lora=True),
}


# ---------------------------------------------------------------- what every process makes in the same way


def make(case: Case, folder: Path, on_ranks: bool) -> System:
    words = load_tokenizer(folder / "tokenizer")
    savings = case.savings if on_ranks else {}
    chunk = savings.get("loss_chunk_tokens", 512 if on_ranks else 0)
    lora = LORA if case.lora else LoraConfig()
    generator = generator_config(case.family, folder, loss_chunk_tokens=chunk, lora=lora)
    cache = savings.get("gradient_cache_passages", 0)
    encoder = replace(ENCODER, gradient_cache_passages=cache, lora=lora)
    return build_system(encoder, generator, train="both", tokenizers=(words, words), seed=5)


def collate(system: System, step: int, part: slice) -> RetrievalBatch:
    """Questions `part` of batch `step`; lengths differ, and the second question has a passage less."""
    random = np.random.default_rng(step)

    def row(shortest: int, longest: int) -> np.ndarray:
        return random.integers(10, 100, random.integers(shortest, longest + 1))

    questions = [row(2, 5) for _ in range(QUESTIONS)]
    passages = [[row(1, 12) for _ in range(K - (i == 1))] for i in range(QUESTIONS)]
    answers = [row(length, length) for length in (1, 2, 7, 3)]  # rank 1 has more chunks
    padded = [[*rows, *[np.array([0])] * (K - len(rows))] for rows in passages]
    flat = [one for rows in padded[part] for one in rows]
    reader = system.generator.collate(questions[part], passages[part], answers[part])
    return RetrievalBatch(*pad_rows(questions[part], 0), *pad_rows(flat, 0), reader)


def share(rank: int, world_size: int) -> slice:
    size = QUESTIONS // world_size
    return slice(rank * size, (rank + 1) * size)


def loss_of(case: Case, outputs: Any) -> torch.Tensor:
    return compute(ObjectiveConfig(name=case.objective), outputs)[0]


# ---------------------------------------------------------------- two ranks


def measure(rank: int, world_size: int, folder: Path, scratch: Path) -> dict[str, Any]:
    """Everything that the tests compare."""
    engine_setup.PERSISTENT_ELEMENTS = 0  # otherwise ZeRO 3 would keep models of this size whole
    head.WHOLE_ELEMENTS = 0  # otherwise nothing here would be cut into chunks
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for stage in STAGES:
            found[f"{name}, {stage}"] = train(rank, world_size, stage, case, folder, scratch / f"{name}-{stage}")
    return found


def train(rank: int, world_size: int, stage: int, case: Case, folder: Path, scratch: Path) -> dict[str, Any]:
    system = make(case, folder, on_ranks=True)
    engine = Engine(system, replace(ENGINE, zero_stage=stage), parameter_groups(system))
    needed = needs(ObjectiveConfig(name=case.objective))
    losses, norms = [], []
    for step in range(STEPS):
        batch = collate(system, step, share(rank, world_size))
        loss = loss_of(case, engine(System.likelihoods, batch, needed, 1.0))
        engine.backward(loss)
        losses.append(loss.item())
        norms.append(engine.step(RATES).grad_norm)
    found: dict[str, Any] = {"losses": losses, "norms": norms, "weights": to_numpy(engine.consolidated_state())}
    found["passage_encoder"] = to_numpy(engine.consolidated_state("retriever.passage_encoder"))
    if not case.lora:
        return found
    # Without its adapters the system is the one that it started as, and goes on training as if nothing had happened.
    batch = collate(system, 0, share(rank, world_size))
    with torch.no_grad(), adapters_disabled(system):
        reference = engine(System.likelihoods, batch, needed, 1.0).per_passage
    assert reference is not None
    found["reference"] = reference.numpy()
    engine.save(scratch)
    other = make(case, folder, on_ranks=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)  # a resume brings the frozen weights, too
    resumed = Engine(other, replace(ENGINE, zero_stage=stage), parameter_groups(other))
    resumed.load(scratch)
    found["resumed"] = to_numpy(resumed.consolidated_state())
    for each in (engine, resumed):
        each.backward(loss_of(case, each(System.likelihoods, batch, needed, 1.0)))
        each.step(RATES)
    found["next"], found["next, resumed"] = (to_numpy(each.consolidated_state()) for each in (engine, resumed))
    # What was consolidated goes below new adapters, which change nothing yet.
    resumed.load_consolidated(engine.consolidated_state())
    found["loaded"] = to_numpy(resumed.consolidated_state())
    return found


# ---------------------------------------------------------------- one process


def reference(case: Case, folder: Path) -> dict[str, Any]:
    """Whole batches, plain autograd, torch's AdamW, each group clipped on its own."""
    system = make(case, folder, on_ranks=False).train()
    before = {name: weight.clone() for name, weight in merged(system, system.state_dict()).items()}
    groups = parameter_groups(system)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "lr": RATES[name]} for name, parameters in groups.items()],
        betas=(ENGINE.beta1, ENGINE.beta2),
        eps=ENGINE.epsilon,
        weight_decay=0.0,
    )
    needed = needs(ObjectiveConfig(name=case.objective))
    with torch.no_grad():
        untrained = system.likelihoods(collate(system, 0, slice(None)), needed, 1.0).per_passage
    assert untrained is not None
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(case, system.likelihoods(collate(system, step, slice(None)), needed, 1.0))
        loss.backward()
        clipped = {name: torch.nn.utils.clip_grad_norm_(group, ENGINE.clip_norm) for name, group in groups.items()}
        norms.append({name: float(norm) for name, norm in clipped.items()})
        optimizer.step()
        losses.append(loss.item())
    weights = {name: weight.clone() for name, weight in merged(system, system.state_dict()).items()}
    return {"losses": losses, "norms": norms, "weights": weights, "before": before, "untrained": untrained}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_families(folder, load_tokenizer(write_tokenizer(folder)), FUSION + CAUSAL + COPY)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks measured, all in one start."""
    return spawn(measure, 2, folder, folder / "scratch", timeout_s=400)


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: reference(case, folder) for name, case in CASES.items()}


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, stage: int, ranks: list[Any], references: dict[str, Any]) -> None:
    expected, both = references[name], [rank[f"{name}, {stage}"] for rank in ranks]
    np.testing.assert_allclose(np.mean([found["losses"] for found in both], axis=0), expected["losses"], rtol=1e-4)
    for step, norms in enumerate(expected["norms"]):
        for group, norm in norms.items():
            assert both[0]["norms"][step][group] == pytest.approx(norm, rel=2e-3), (step, group)
    compare(both[0]["weights"], expected["weights"])
    moved = [key for key, value in both[0]["weights"].items() if not np.array_equal(value, expected["before"][key])]
    assert any(key.startswith("generator") for key in moved)
    assert any(key.startswith("retriever") for key in moved)
    prefix = "retriever.passage_encoder."
    published = {f"{prefix}{key}": value for key, value in both[0]["passage_encoder"].items()}
    assert published.keys() == {key for key in expected["weights"] if key.startswith(prefix)}
    compare(published, expected["weights"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lora])
def test_adapters_off_resume_and_merge(name: str, stage: int, ranks: list[Any], references: dict[str, Any]) -> None:
    expected = references[name]
    for rank, found in enumerate(ranks):
        answers = expected["untrained"][share(rank, 2)]
        width = found[f"{name}, {stage}"]["reference"].shape[2]
        np.testing.assert_allclose(found[f"{name}, {stage}"]["reference"], answers[..., :width], rtol=1e-4, atol=1e-4)
    found = ranks[0][f"{name}, {stage}"]
    for one, two in (("resumed", "weights"), ("next, resumed", "next"), ("loaded", "next")):
        assert found[one].keys() == found[two].keys()
        for key, value in found[one].items():
            np.testing.assert_array_equal(value, found[two][key], err_msg=f"{one}, {key}")
    assert any(not np.array_equal(found["next"][key], found["weights"][key]) for key in found["next"])


def compare(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    """Weights by name, one step being about 0.01; what is shared may stand under one name only."""
    assert found.keys() <= expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=2e-3, atol=1e-4, err_msg=name)
