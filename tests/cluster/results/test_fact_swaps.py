"""What a swap of facts did, the table of contexts, and settings of contexts that cannot be."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from cluster.commands.measure import at_date, measure
from cluster.config.experiment import load
from cluster.config.preflight import check_long_prompts
from cluster.config.settings import Settings
from cluster.results.context_costs import context_table, needle_sections
from cluster.results.fact_swaps import swap, update_table
from cluster.results.findings import Findings, Measured
from cluster.results.summary import summarise
from training.metrics import exact_match
from training.reporting.plots import HeatMap, Points, heat_svg, points_svg
from training.reporting.report import print_table
from training.training_settings import GeneratorConfig


def row(id: str, answers: str, prediction: str, found: float | None = None) -> dict[str, Any]:
    gold = [answers]
    return {
        "id": id,
        "answers": gold,
        "prediction": prediction,
        "exact_match": exact_match(prediction, gold),
        "gold_in_k": found,
    }


def measured(*rows: dict[str, Any], **result: Any) -> Measured:
    return Measured("x", {"metrics": {}, **result}, list(rows))


# ---------------------------------------------------------------- swaps


def test_a_swap_by_hand() -> None:
    before = measured(
        *(row("follows", "krob", "krob"), row("sticks", "krob", "krob"), row("missed", "krob", "krob")),
        *(row("never read", "krob", "zuf"), row("learned", "krob", "zuf"), row("unlabelled", "krob", "krob")),
        *(row("same", "krob", "krob"), row("lost", "krob", "krob"), row("gone", "krob", "krob")),
    )
    after = measured(
        *(row("follows", "vesul", "vesul", 1.0), row("sticks", "vesul", "krob", 1.0)),
        *(row("missed", "vesul", "povin", 0.0), row("never read", "vesul", "povin", 1.0)),
        *(row("learned", "vesul", "vesul", 1.0), row("unlabelled", "vesul", "vesul", None)),
        *(row("same", "krob", "krob", 1.0), row("lost", "krob", "vesul", 1.0), row("new", "vesul", "vesul", 1.0)),
    )
    found = swap(before, after)
    assert found["num_changed"] == 6
    assert found["new"] == pytest.approx(3 / 6)
    assert found["old"] == pytest.approx(1 / 6)
    assert found["before"] == pytest.approx(4 / 6)
    assert (found["num_found"], found["found"]) == (4, pytest.approx(4 / 5))  # of the five with a labelled passage
    assert found["followed"] == pytest.approx(2 / 4)
    assert found["followed_known"] == pytest.approx(1 / 2)  # follows, not sticks
    assert (found["num_unchanged"], found["unchanged_before"], found["unchanged_after"]) == (2, 1.0, 0.5)


def test_a_swap_that_changed_nothing_says_so() -> None:
    same = measured(row("a", "krob", "krob", 1.0))
    found = swap(same, same)
    assert (found["num_changed"], found["num_unchanged"]) == (0, 1)
    assert math.isnan(found["new"])
    assert math.isnan(found["followed"])
    printed = print_table(update_table({"joint": found}))
    assert "joint: no answer changed between the two" in printed


def test_the_summary_has_the_update_of_every_stage() -> None:
    before, after = measured(row("a", "krob", "krob")), measured(row("a", "vesul", "vesul", 1.0))
    findings = Findings({"first": before, "last": before}, {"first": (before, before), "last": (before, after)})
    summary = summarise(findings)
    assert summary["swap"] == summary["updates"]["last"]
    assert summary["updates"]["first"]["num_changed"] == 0
    assert summary["swap"]["followed"] == 1.0


def test_evaluate_refuses_an_update_that_is_none_and_a_retriever_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {name: a}\ncorpus: {as_of: '2024-01-01'}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"update\.as_of=2024-01-01: must be another date than corpus\.as_of"):
        measure(load([str(file)], ["update.as_of=2024-01-01"]), "")
    retriever = ["objective.name=inverse_cloze", "training.train=retriever_only"]
    with pytest.raises(ValueError, match=r"objective\.name=inverse_cloze: must have a generator"):
        measure(load([str(file)], retriever), "")


def test_the_same_system_is_asked_about_another_date() -> None:
    settings = load([], ["evaluation.needle.lengths=[9]", "evaluation.needle.depths=[0]"]).stages["joint"]
    asked = at_date(settings, "end", "quickstart/joint/later", "checkpoint")
    assert (asked.corpus.as_of, asked.questions.as_of) == ("end", "end")
    assert (asked.training.train, asked.training.steps) == ("none", 0)
    assert (asked.evaluation.also, asked.evaluation.needle.lengths) == ([], [])
    assert (asked.encoder, asked.generator, asked.objective) == (
        settings.encoder,
        settings.generator,
        settings.objective,
    )


# ---------------------------------------------------------------- contexts


def costs(tokens: float, seconds: float = 0.5) -> dict[str, float]:
    return {
        "prompt_tokens": tokens,
        "flops": 2e9 * tokens,
        "retrieval_flops": 3e9,
        "kv_cache_bytes": 1024 * tokens,
        "state_bytes": 0.0,
        "seconds": seconds,
        "search_seconds": 0.25,
    }


def test_one_row_for_every_context_that_was_measured() -> None:
    metrics = {"exact_match": 0.5, "f1": 0.75, "long/exact_match": 0.25, "long/f1": 0.5}
    joint = Measured(
        "joint", {"metrics": metrics, "source": "index", "costs": {"marginal": costs(100), "long": costs(4000)}}, []
    )
    fixed = Measured("frozen", {"metrics": metrics, "source": "fixed", "costs": {"fused": costs(50)}}, [])
    old = Measured("old", {"metrics": metrics}, [])
    table = context_table({"old": old, "frozen": fixed, "joint": joint})
    assert table is not None
    assert [tuple(row) for row in table.rows] == [
        ("frozen, fixed (fused)", 0.5, 0.75, 50, 100.0, 3.0, 50.0, 0.0, 0.5, 0.25),
        ("joint, index (marginal)", 0.5, 0.75, 100, 200.0, 3.0, 100.0, 0.0, 0.5, 0.25),
        ("joint, long", 0.25, 0.5, 4000, 8000.0, 3.0, 4000.0, 0.0, 0.5, 0.25),
    ]
    assert context_table({"old": old}) is None


def test_a_sweep_becomes_a_heat_map() -> None:
    sweep = {"lengths": [128, 4096], "depths": [0.0, 0.5, 1.0], "num_questions": 7}
    sweep["exact_match"] = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    joint = Measured("joint", {"metrics": {}, "needle": sweep}, [])
    (section,) = needle_sections({"other": Measured("other", {"metrics": {}}, []), "joint": joint})
    texts = [element.text for element in ElementTree.fromstring(section.body).iter() if element.text]
    assert {"128", "4,096", "0%", "50%", "100%", "0.10", "0.60", "joint: exact match, 7 questions a cell"} <= set(texts)
    assert texts.index("0.10") < texts.index("0.40") < texts.index("0.20")  # a row for each depth


def test_plots_are_self_contained() -> None:
    points = Points("cells", ["a", "b"], {"recall@1": [(0.5, 0.1), None], "exact_match": [(0.2, 0.0), (0.1, 0.0)]}, "a")
    for svg in (points_svg(points), heat_svg(HeatMap(title="heat", columns=["1"], rows=["2"], values=[[0.5]]))):
        root = ElementTree.fromstring(svg)
        assert not [element for element in root.iter() if element.tag.endswith("image")]
        assert "http" not in svg.replace("http://www.w3.org/", "")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("retrieval.source=lnog", "retrieval.source=lnog: must be one of index, fixed, gold, long, none. Did you mean"),
        ("retrieval.source=fixed", "retrieval.source=fixed: must be index with training.train=both, or training.train"),
        ("retrieval.source=long", "retrieval.source=long: must be index or gold with training.train=both"),
        (
            "retrieval.source=long training.train=generator_only",
            "evaluation.decoding.mode=marginal: must be fused with retrieval.source=long",
        ),
        (
            "retrieval.source=long training.train=generator_only evaluation.decoding.mode=fused",
            "objective.name=rag_sequence: must be fused with objective.score_bias=false where retrieval.source=long",
        ),
        (
            "evaluation.also=[long]",
            "retrieval.max_context_tokens=0: must be set for long prompts with generator.kind=copy",
        ),
        (
            "generator.kind=causal evaluation.also=[long] retrieval.max_context_tokens=9000",
            "retrieval.max_context_tokens=9000: must be at most 8192, the context of a fresh causal model",
        ),
        (
            "generator.kind=causal evaluation.needle.lengths=[100,9000] evaluation.needle.depths=[0.5]",
            "evaluation.needle.lengths=9000: must be at most 8192",
        ),
        ("evaluation.needle.lengths=[100]", "evaluation.needle.depths=[]: lengths and depths must both be given"),
        ("evaluation.needle.depths=[0.5]", "evaluation.needle.lengths=[]: lengths and depths must both be given"),
        (
            "evaluation.needle.lengths=[100] evaluation.needle.depths=[1.5]",
            "evaluation.needle.depths=1.5: must be between 0 (first) and 1 (last)",
        ),
        (
            "evaluation.needle.lengths=[0] evaluation.needle.depths=[1]",
            "evaluation.needle.lengths=0: must be 1 or more tokens",
        ),
        (
            "evaluation.needle.lengths=[9,9] evaluation.needle.depths=[1]",
            "evaluation.needle.lengths=[9, 9]: must name each value once",
        ),
        ("evaluation.needle.lengths=[x] evaluation.needle.depths=[1]", "evaluation.needle.lengths"),
    ],
)
def test_contexts_that_cannot_be(tmp_path: Path, overrides: str, expected: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load([str(file)], overrides.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [LlamaConfig(max_position_embeddings=256), GPT2Config(n_positions=256)])
def test_a_context_that_is_too_small_is_seen_before_the_model_is_read(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    settings = Settings(generator=GeneratorConfig(kind="causal", name=str(tmp_path)))
    settings.retrieval.max_context_tokens = 300
    check_long_prompts(settings)  # not asked for
    settings.evaluation.also = ["long"]
    with pytest.raises(
        ValueError, match=r"retrieval\.max_context_tokens=300: must be at most 256, the generator's context"
    ):
        check_long_prompts(settings)
    settings.retrieval.max_context_tokens = 200
    check_long_prompts(settings)
