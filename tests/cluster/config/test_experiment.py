"""Files, stages and overrides become typed settings; every mistake is one sentence that names it."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cluster.config.config_files import ROOT
from cluster.config.experiment import Experiment, experiment_to_yaml, load, to_yaml
from cluster.config.preflight import check_index, check_models, check_where
from cluster.config.settings import Settings
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.passages import write_store
from training.training_settings import RetrievalConfig

STAGED = """
run: {name: demo}
training: {steps: 250}
retrieval: {k: 5}
stages:
  pretrain:
    objective: {name: inverse_cloze}
    training: {train: retriever_only, steps: 80}
  joint:
    run: {init_from: pretrain}
    evaluation: {also: [fused, closed_book]}
update: {as_of: end, stages: [joint]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def refusal(paths: list[str], *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(paths, list(overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_file_loads(file: Path) -> None:
    assert load([str(file)], []).stages


def test_file_without_stages_is_one_run(write) -> None:
    experiment = load([write("training: {steps: 3}")], [])
    assert experiment.stages == {"": experiment.settings}
    assert experiment.settings.training.steps == 3
    assert experiment.settings.retrieval == Settings().retrieval


def test_stages_inherit_keep_their_order_and_name_their_runs(write) -> None:
    experiment = load([write(STAGED)], [])
    assert list(experiment.stages) == ["pretrain", "joint"]
    pretrain, joint = experiment.stages.values()
    assert (pretrain.training.steps, joint.training.steps) == (80, 250)
    assert pretrain.retrieval.k == joint.retrieval.k == 5
    assert (pretrain.run.name, joint.run.name) == ("demo/pretrain", "demo/joint")
    assert joint.run.init_from == "runs/demo/pretrain"
    assert joint.evaluation.also == ["fused", "closed_book"]
    assert experiment.update.stages == ["joint"]
    assert experiment.directory == Path("runs/demo")


def test_command_line_wins_everywhere_and_its_stage_overrides_win_over_that(write) -> None:
    experiment = load([write(STAGED)], ["stages.joint.training.steps=7", "training.steps=5", "run.name=other"])
    assert experiment.stages["pretrain"].training.steps == 5
    assert experiment.stages["joint"].training.steps == 7
    assert experiment.stages["joint"].run.init_from == "runs/other/pretrain"


def test_a_start_from_the_command_line_is_that_of_the_first_stages(write) -> None:
    """What starts from another stage of the file still does; one stage alone can be told otherwise."""
    file, start = write(STAGED), "/elsewhere/run"
    stages = load([file], [f"run.init_from={start}"]).stages
    assert [stage.run.init_from for stage in stages.values()] == [start, "runs/demo/pretrain"]
    stages = load([file], [f"stages.joint.run.init_from={start}"]).stages
    assert [stage.run.init_from for stage in stages.values()] == ["", start]


def test_later_files_win_over_earlier_ones(write) -> None:
    paths = [write(STAGED), write("stages: {joint: {training: {steps: 9}}}\nretrieval: {k: 2}", "b.yaml")]
    experiment = load(paths, [])
    assert experiment.stages["joint"].training.steps == 9
    assert experiment.stages["joint"].evaluation.also == ["fused", "closed_book"]
    assert experiment.stages["pretrain"].retrieval.k == 2


def test_list_and_list_item_overrides(write) -> None:
    path = write("evaluation: {also: [fused, top1]}")
    assert load([path], ["evaluation.also=[gold]"]).settings.evaluation.also == ["gold"]
    assert load([path], ["evaluation.also.1=gold"]).settings.evaluation.also == ["fused", "gold"]
    assert load([path], ["evaluation.also=[]"]).settings.evaluation.also == []


def test_the_type_of_the_setting_says_what_a_value_is(write) -> None:
    text = (
        "monitor: {wandb: off}\nencoder: {normalize: true}\nrun: {name: 007}\ncorpus: {as_of: 2024-01-01}\nretrieval:\n"
    )
    settings = load([write(text)], ["training.lr_retriever=1e-4", "generator.name="]).settings
    assert (settings.monitor.wandb, settings.encoder.normalize, settings.run.name) == ("off", "true", "007")
    assert settings.corpus.as_of == "2024-01-01"
    assert settings.training.lr_retriever == 1e-4
    assert settings.generator.name == ""


def same(left: Experiment, right: Experiment) -> bool:
    return left.stages == right.stages and left.update == right.update


def test_conditions_on_passages(write) -> None:
    """`retrieval.where` is open: its fields are the corpus' own; values stay text, whatever they look like."""
    path = write(
        "retrieval: {where: {lang: en, year: {'>=': 2019}}}\nstages: {a: , b: {retrieval: {where: {kind: x}}}}"
    )
    experiment = load([path], ["retrieval.where.lang=[de, fr]", 'stages.b.retrieval.where.year={"<": 2024}'])
    first, second = (stage.retrieval.where for stage in experiment.stages.values())
    assert first == {"lang": ["de", "fr"], "year": {">=": "2019"}}
    assert second == {"lang": ["de", "fr"], "year": {">=": "2019", "<": "2024"}, "kind": "x"}
    assert same(load([write(experiment_to_yaml(experiment), "again.yaml")], []), experiment)
    lifted = load([path], ["retrieval.where.lang="]).settings.retrieval.where
    assert parse_filter(lifted) == parse_filter({"year": {">=": 2019}})
    assert load([write("retrieval: {where: }", "none.yaml")], []).settings.retrieval.where == {}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("retrieval.where=en", "retrieval.where=en: must map names to values"),
        ("retrieval.where.year={'=>': 1}", "retrieval.where.year={'=>': '1'}: bounds are >=, >, <=, <"),
        ("retrieval.where.lang=[]", "retrieval.where.lang=[]: no passage could pass"),
        ("retrieval.wher.lang=en", "unknown setting retrieval.wher"),
    ],
)
def test_mistakes_in_conditions(write, override: str, expected: str) -> None:
    assert expected in refusal([write("")], override)


def test_kinds_of_index_that_do_not_fit(write) -> None:
    gpu = refusal([write("")], "index.device=gpu", "index.factory=HNSW32")
    assert "index.factory=HNSW32: must be without HNSW with index.device=gpu" in gpu
    for factory, message in (
        (
            "PQ48",
            "must cut vectors of 128 numbers into equal parts: 16, 32, 64, not 48",
        ),
        ("IVF600,Flat", "must have 1 to 500 lists: a shard holds 500 vectors"),
        ("PQ16x9", "must train on at most 500 vectors, those of a shard, but needs 512"),
    ):
        with pytest.raises(ValueError, match=message):
            check_index(load([write("")], [f"index.factory={factory}"]).settings, 1000)
    check_index(load([write("")], ["index.factory=PQ16", "index.rescore_candidates=50"]).settings, 1000)


def test_a_filter_that_nobody_passes_is_refused_beforehand(tmp_path: Path) -> None:
    passages = [Passage(str(n), "", "text", {"year": 2000 + n}) for n in range(9)]
    store = write_store(tmp_path / "store", passages, []).path
    settings = Settings(retrieval=RetrievalConfig(k=4, where={"year": {">=": 2006}}))
    with pytest.raises(ValueError, match=r"retrieval\.where=year>=2006.*: must let retrieval\.k=4 passages.* 3 do"):
        check_where(settings, store)
    check_where(replace(settings, retrieval=replace(settings.retrieval, k=3)), store)
    check_where(replace(settings, retrieval=replace(settings.retrieval, source="none")), store)
    with pytest.raises(ValueError, match=r"retrieval\.where\.day: no passage has this field; their metadata has year"):
        check_where(replace(settings, retrieval=RetrievalConfig(where={"day": 1})), store)


def test_written_settings_are_read_back(write) -> None:
    experiment = load([write(STAGED)], ["generator.template={passages} x: {question} ="])
    again = load([write(experiment_to_yaml(experiment), "again.yaml")], [])
    assert same(experiment, again)
    joint = experiment.stages["joint"]
    assert load([write(to_yaml(joint), "joint.yaml")], []).settings == joint


def test_a_run_folder_stands_for_its_configuration(write, tmp_path: Path) -> None:
    write("training: {steps: 4}", "config.yaml")
    assert load([str(tmp_path)], []).settings.training.steps == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {stepz: 5}", "a.yaml: unknown setting training.stepz. Did you mean training.steps?"),
        ("traning: {steps: 5}", "unknown setting traning. Did you mean training or pretraining?"),
        ("steps: 5", "unknown setting steps. Did you mean training.steps?"),
        ("encoder: {fresh: {hiden: 3}}", "encoder.fresh.hiden. Did you mean encoder.fresh.hidden?"),
        ("stages: {a: {training: {stepz: 5}}}", "stages.a.training.stepz. Did you mean training.steps?"),
        ("stages: {a: {training: {steps: x}}}", "a.yaml: stages.a.training.steps: value 'x' must be a whole number"),
        ("training: {steps: 1.5}", "a.yaml: training.steps: value '1.5' must be a whole number"),
        ("training: {lr_retriever: fast}", "training.lr_retriever: value 'fast' must be a number"),
        ("monitor: {console: maybe}", "monitor.console: value 'maybe' must be true or false"),
        ("training: 3", "training=3: must be a section with settings"),
        ("run: {name: [a]}", "run.name=['a']: must be one value"),
        ("evaluation: {also: fused}", "evaluation.also=fused: must be a list"),
        ("training:\n  steps: 1\n  steps: 2", "a.yaml:3: not YAML: duplicate key steps"),
        ("training: [", "a.yaml:1: not YAML"),
        ("- 1", "must hold sections"),
        ("run: {name: '${run.nam}'}", "run.name: interpolation key 'run.nam' not found"),
        ("stages: {a: {run: {name: b}}}", "stages.a.run.name: set run.name once"),
        ("stages: {a: {run: {init_from: b}}, b: }", "stages.a.run.init_from=b: must name an earlier stage"),
        (
            "stages: {first: , b: {run: {init_from: frist}}}",
            "must be an earlier stage (first) or a folder that exists.",
        ),
        ("stages: {a: }\nupdate: {as_of: end}", "update.stages=[]: must name stages of this file: a"),
        ("stages: {a: }\nupdate: {as_of: end, stages: [b]}", "update.stages=b: must name stages"),
        ("stages: {a: }\nupdate: {stages: [a]}", "update.as_of="),
        ("corpus: {as_of: yesterday}", 'corpus.as_of=yesterday: must be empty, "end" or a date'),
    ],
)
def test_mistakes_in_a_file(write, text: str, expected: str) -> None:
    assert expected in refusal([write(text)])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stepz=5", "command line: unknown setting training.stepz. Did you mean training.steps?"),
        ("traning.steps=5", "unknown setting traning.steps. Did you mean training.steps"),
        ("training.steps=many", "command line: training.steps: value 'many' must be a whole number"),
        ("training.steps.x=5", "training.steps is one value and has nothing below it"),
        ("stages.jont.training.steps=5", "must be stages.<stage>.section.field=value"),
        ("stages.joint.run.name=x", "set run.name once"),
        ("stages.joint.training.stepz=1", "stages.joint.training.stepz. Did you mean training.steps?"),
        ("evaluation.also.5=gold", "evaluation.also[5]: list index out of range"),
        ("evaluation.also=[fussed]", "stage pretrain: evaluation.also=fussed: must be one of"),
        ("training.train=boht", "Did you mean both?"),
        ("index.num_shards=0", "index.num_shards=0: must be at least 1"),
        ("index.replicas=0", "index.replicas=0: must be at least 1"),
        ("index.on_slow=hegde", "index.on_slow=hegde: must be one of wait, hedge, refuse. Did you mean hedge?"),
        ("index.on_slow=refuse", "index.slow_after_s=0: must be above 0 with index.on_slow=refuse"),
        ("index.slow_after_s=120", "index.slow_after_s=120.0: must be below index.search_timeout_s=120"),
        ("retrieval.k=0", "retrieval.k=0: must be at least 1"),
        ("encoder.temperature=0", "encoder.temperature=0.0: must be above 0"),
        ("training.lr_generator=nan", "training.lr_generator=nan: must be a finite number"),
        ("training.warmup_steps=-1", "training.warmup_steps=-1: must not be negative"),
        ("training.retriever_delay_steps=-1", "training.retriever_delay_steps=-1: must not be negative"),
        ("training.retriever_delay_steps=300", "training.retriever_delay_steps=300: must be below training.steps="),
        ("objective.drop_probability=1.5", "must be at least 0 and below 1"),
        ("cluster.trainer_gpus=1.5", "cluster.trainer_gpus=1.5: must be -1"),
        ("index.factory=IVF,Flat", "index.factory=IVF,Flat: must be one of Flat, SQfp16, SQ8, PQm, IVFn,"),
        ("index.rescore_candidates=3", "index.rescore_candidates=3: must be 0 (off) or at least retrieval.k="),
        ("index.factory=OPQ8,PQ16", "index.factory=OPQ8,PQ16: must have the same number of parts for OPQ and PQ"),
        ("index.ef_search=0", "index.ef_search=0: must be at least 1"),
        ("engine.zero_stage=4", "engine.zero_stage=4: must be 0, 1, 2 or 3"),
        ("engine.offload_optimizer=true", "engine.offload_optimizer=true: must be false with engine.zero_stage=0"),
        ("encoder.fresh.num_heads=3", "encoder.fresh.hidden=128: must be a multiple of num_heads=3"),
        ("generator.template=none", "generator.template='none': must contain {passages} and {question}"),
        ("objective.min_span=20", "objective.min_span=20: must not exceed objective.max_span=14"),
        ("stages.pretrain.training.train=both", "stage pretrain: training.train=both: must be retriever_only"),
        ("stages.joint.retrieval.source=none", "stage joint: retrieval.source=none: must be index or gold"),
        (
            "refresh.max_staleness_steps=10",
            "stage joint: refresh.max_staleness_steps=10: must be 0 (no bound) or at least",
        ),
        ("run.name=../up", "run.name=../up/pretrain: must be letters"),
        ("retrieval.rescore=-1", "retrieval.rescore=-1: must not be negative"),
        ("retrieval.rescore=2.5", "retrieval.rescore: value '2.5' must be a whole number"),
        ("refresh.policy=drift", "refresh.policy=drift: must be one of every_steps, on_drift, both."),
        ("refresh.policy=on_drit", "Did you mean on_drift?"),
        ("refresh.drift_threshold=1.5", "refresh.drift_threshold=1.5: must be between 0 and 1"),
        ("refresh.max_share=2", "refresh.max_share=2.0: must be between 0 and 1"),
        ("refresh.partial=1.1", "refresh.partial=1.1: must be at least 0 and below 1"),
        ("refresh.partial=1", "refresh.partial=1.0: must be at least 0 and below 1"),
        ("refresh.whole_every=-2", "refresh.whole_every=-2: must not be negative"),
        ("refresh.policy=on_drift", "refresh.drift_threshold=0.0: must be above 0 with refresh.policy=on_drift"),
    ],
)
def test_mistakes_on_the_command_line(write, override: str, expected: str) -> None:
    assert expected in refusal([write(STAGED)], override)


def test_settings_that_contradict_each_other(write) -> None:
    path = write("objective: {name: fused}")
    assert "generator.kind=causal: must be copy or fusion" in refusal([path], "generator.kind=causal")
    assert "objective.score_bias=false: must be true" in refusal([path], "objective.score_bias=false")
    assert load([path], ["objective.score_bias=false", "training.train=generator_only"]).settings
    for name, kinds in (("adist", ("fusion", "causal")), ("loop", ("fusion",))):
        for kind in kinds:
            flash = [f"objective.name={name}", f"generator.kind={kind}", "generator.attention=flash_attention_2"]
            expected = f"generator.attention=flash_attention_2: must be auto, eager or sdpa with objective.name={name}"
            assert expected in refusal([path], *flash)
    assert "objective.null_score=zero: must be one of learned, fixed" in refusal([path], "objective.null_score=zero")
    assert "training.on_collapse=wrn: must be one of" in refusal([path], "training.on_collapse=wrn")


def test_a_search_is_hedged_only_where_there_are_replicas(write) -> None:
    hedge = ["index.on_slow=hedge", "index.slow_after_s=0.5"]
    assert "index.replicas=1: must be 2 or more with index.on_slow=hedge" in refusal([write("")], *hedge)
    assert load([write("")], [*hedge, "index.replicas=2"]).settings.index.replicas == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["refresh.check_every_steps=0"], "refresh.check_every_steps=0: must be above 0 with refresh.policy=on_drift"),
        (["refresh.probe_questions=0"], "refresh.probe_questions=0: must be above 0 with refresh.policy=on_drift"),
        (
            ["refresh.policy=both", "refresh.every_steps=0"],
            "refresh.every_steps=0: must be above 0 with refresh.policy",
        ),
        (
            ["refresh.max_staleness_steps=90"],
            "refresh.max_staleness_steps=90: must be 0 (no bound) with refresh",
        ),
        (
            ["refresh.policy=both", "refresh.max_staleness_steps=90", "refresh.partial=0.2"],
            "refresh.max_staleness_steps=90: must be 0 (no bound) or at least 250 steps, from one whole refresh to",
        ),
        (
            ["refresh.policy=both", "refresh.max_staleness_steps=90", "refresh.partial=0.2", "refresh.whole_every=0"],
            "refresh.max_staleness_steps=90: must be 0 (no bound) where refresh.partial is set and refresh.whole_every",
        ),
    ],
)
def test_refresh_policies_that_cannot_decide_or_keep_a_bound(write, overrides: list[str], expected: str) -> None:
    path = write("refresh: {policy: on_drift, drift_threshold: 0.8, check_every_steps: 10}")
    assert load([path], []).settings.refresh.policy == "on_drift"
    assert expected in refusal([path], *overrides)


def test_more_candidates_than_passages_are_refused() -> None:
    settings = Settings()
    settings.retrieval.k, settings.retrieval.rescore = 4, 5
    check_index(settings, 20)
    with pytest.raises(ValueError, match=r"retrieval\.rescore=5: must be at most 4: so many times retrieval\.k=4"):
        check_index(settings, 19)


def test_a_generator_without_attention_is_refused_before_it_is_loaded(write, tmp_path: Path) -> None:
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba2"}')
    overrides = ["generator.kind=causal", f"generator.name={tmp_path / 'mamba'}", "generator.attention=eager"]
    check_models(load([write("objective: {name: loop}")], overrides).settings)
    with pytest.raises(ValueError, match=r"generator\.name=.*mamba: must have attention with objective\.name=adist"):
        check_models(load([write("objective: {name: adist}")], overrides).settings)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretraining.salient_span=0", "pretraining.salient_span=0.0: the weights of the mixture are 0 together"),
        ("pretraining.inverse_cloze=1", "pretraining has weights for inverse_cloze alone, which have no answers"),
        ("pretraining.prefix_lm=-1", "pretraining.prefix_lm=-1.0: must not be negative"),
        ("pretraining.cloze=1", "unknown setting pretraining.cloze"),
        ("pretraining.salient_spam=1", "Did you mean pretraining.salient_span?"),
        ("pretraining.recognizer=spacy", "pretraining.recognizer=spacy: must be regex or module:function"),
        ("pretraining.mask_share=0.6", "pretraining.mask_share=0.6: must be above 0 and at most 0.5"),
        ("pretraining.held_out=1", "pretraining.held_out=1.0: must be at least 0 and below 1"),
        ("pretraining.duplicate_threshold=0", "pretraining.duplicate_threshold=0.0: must be above 0"),
        ("questions.choice_template={options}", "questions.choice_template='{options}': must contain {question} once"),
        ("questions.choice_template={question} {hint}", "and no other field"),
        ("questions.labels=[yes]", "questions.labels=['yes']: must be two or more different labels"),
        ("questions.refusal_share=0.1", "questions.refusal_share=0.1: needs questions.refusal"),
        ("questions.refusal_share=2", "questions.refusal_share=2.0: must be between 0 and 1"),
        ("questions.unanswerable=none", "questions.unanswerable=none: needs questions.refusal"),
        ("questions.target=best", "questions.target=best: must be one of first, sampled, in_passage"),
        ("questions.train=", "questions.train=: must name a split, unless the stage has a section pretraining"),
        ("generator.chat_template=on", "generator.chat_template=on: must be one of auto, never"),
        ("generator.max_context_tokens=0", "generator.max_context_tokens=0: must be at least 1"),
    ],
)
def test_mistakes_of_tasks_and_formats(write, override: str, expected: str) -> None:
    assert expected in refusal([write("")], override)


def test_pretraining_refuses_what_does_not_fit_it(write) -> None:
    path = write("pretraining: {salient_span: 0.5, prefix_lm: 0.5}\nquestions: {refusal: none}")
    settings = load([path], ["questions.train=", "questions.evaluate="]).settings
    assert (settings.pretraining.salient_span, settings.pretraining.span_corruption) == (0.5, None)
    assert "objective.name=inverse_cloze: must be an objective that reads answers" in refusal(
        [path], "objective.name=inverse_cloze", "training.train=retriever_only"
    )
    assert "retrieval.source=gold: must be index or none" in refusal([path], "retrieval.source=gold")
    assert "questions.refusal_share=0.5: must be 0" in refusal([path], "questions.refusal_share=0.5")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("retrieval.hybrid=rff", "retrieval.hybrid=rff: must be one of none, rrf, learned. Did you mean rrf?"),
        (
            "retrieval.hybrid=rrf retrieval.source=none training.train=generator_only",
            "retrieval.hybrid=rrf: must be none with retrieval.source=none",
        ),
        ("retrieval.hybrid=rrf retrieval.candidates=3", "retrieval.candidates=3: must be at least retrieval.k=4"),
        ("retrieval.candidates=0", "retrieval.candidates=0: must be at least 1"),
        ("retrieval.rrf_constant=-1", "retrieval.rrf_constant=-1.0: must not be negative"),
        (
            "retrieval.hybrid=rrf retrieval.rescore=4 retrieval.candidates=15",
            "retrieval.candidates=15: must be at least 16: retrieval.rescore=4 times retrieval.k=4 are chosen",
        ),
        (
            "retrieval.hybrid=learned retrieval.rescore=6 reranker.mode=add",
            "retrieval.candidates=100: must be at least 120: retrieval.rescore=6 times reranker.candidates=20",
        ),
        (
            "retrieval.hybrid=learned retrieval.candidates=19 reranker.mode=add",
            "retrieval.candidates=19: must be at least 20: reranker.candidates=20 are chosen among those",
        ),
        (
            "retrieval.hybrid=rrf index.on_slow=refuse index.slow_after_s=1",
            "index.on_slow=refuse: must be wait or hedge with retrieval.hybrid=rrf",
        ),
        (
            "reranker.mode=replace retrieval.rescore=2",
            "retrieval.rescore=2: must be 0 with reranker.mode=replace: the retriever does not train",
        ),
        ("retrieval.lexical_weight=0", "retrieval.lexical_weight=0.0: must be above 0"),
        ("lexical.b=1.2", "lexical.b=1.2: must be between 0 and 1"),
        ("lexical.k1=-1", "lexical.k1=-1.0: must not be negative"),
        ("lexical.stemmer=englsh", "lexical.stemmer=englsh: must be empty or one of"),
        ("lexical.stop_words=klingon", "lexical.stop_words=klingon: must be empty or one of english, german"),
        ("lexical.token_pattern=(a)(b)", "lexical.token_pattern=(a)(b): must be a pattern of words without groups"),
        ("reranker.mode=on", "reranker.mode=on: must be one of off, add, replace"),
        ("reranker.mode=add reranker.candidates=3", "reranker.candidates=3: must be at least retrieval.k=4"),
        (
            "reranker.mode=add retrieval.source=none training.train=generator_only",
            "reranker.mode=add: must be off with retrieval.source=none",
        ),
        (
            "reranker.mode=replace retrieval.hybrid=learned",
            "retrieval.hybrid=learned: must be none or rrf with reranker.mode=replace",
        ),
        (
            "reranker.mode=add reranker.name=x pretraining.prefix_lm=1",
            "reranker.name=x: must be empty (a fresh re-ranker) with a section pretraining",
        ),
        ("reranker.fresh.hidden=30", "reranker.fresh.hidden=30: must be a multiple of num_heads=4"),
    ],
)
def test_mistakes_of_hybrid_retrieval(write, overrides: str, expected: str) -> None:
    assert expected in refusal([write("")], *overrides.split(" "))


def test_a_stage_that_searches_nothing_ignores_what_the_others_search_with(write) -> None:
    """One section for all stages of a file: the warm start has nothing to re-rank."""
    staged = "retrieval: {hybrid: learned, candidates: 2}\nreranker: {mode: add, candidates: 1}\n"
    warm = "objective: {name: inverse_cloze}\ntraining: {train: retriever_only}"
    assert load([write(staged + warm)], []).settings.retrieval.hybrid == "learned"


def test_a_model_without_a_head_is_refused_before_anything_starts(write, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    config = '{"model_type": "bert", "architectures": ["BertModel"]}'
    (tmp_path / "plain" / "config.json").write_text(config, encoding="utf-8")
    settings = load([write("reranker: {mode: add}")], [f"reranker.name={tmp_path}/plain"]).settings
    with pytest.raises(ValueError, match="must be a cross-encoder"):
        check_models(settings)
    with pytest.raises(ValueError, match=r"reranker\.name=/no/such: must be a folder that exists"):
        check_models(replace(settings, reranker=replace(settings.reranker, name="/no/such")))


def test_a_weight_that_is_not_set_survives_writing_and_can_be_unset(write) -> None:
    experiment = load(
        [write("pretraining: {salient_span: 0.5}\nstages: {a: , b: {pretraining: {salient_span: null}}}")], []
    )
    assert [stage.pretraining.salient_span for stage in experiment.stages.values()] == [0.5, None]
    assert same(load([write(experiment_to_yaml(experiment), "again.yaml")], []), experiment)
    assert load([write("")], ["pretraining.prefix_lm=null"]).settings == Settings()


def test_missing_file_suggests_a_neighbour(write, tmp_path: Path) -> None:
    write("", "quickstart.yaml")
    assert f"Did you mean {tmp_path}/quickstart.yaml" in refusal([str(tmp_path / "quikstart.yaml")])
    assert "no config.yaml in the folder" in refusal([str(tmp_path)])


def test_defaults_are_valid_and_configuration_is_light(write) -> None:
    assert load([write("")], []).settings == Settings()
    heavy = "{'torch', 'ray', 'deepspeed', 'transformers', 'numpy', 'faiss', 'wandb'}"
    command = f"import sys, cluster.config, cluster.cli; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"


def test_every_section_is_documented_beside_its_owner() -> None:
    for section in fields(Settings):
        assert section.type.__doc__, section.name  # pyright: ignore[reportAttributeAccessIssue]
