"""The matrix: what its cells are, that finished ones are not run again, and the arithmetic of the table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.commands.compare import Task, run_matrix
from cluster.config.experiment import Experiment, load
from cluster.config.matrix import folder_of
from cluster.prepare.stores import Prepared
from cluster.results.comparison import compare_cells, comparison_table, paired_to, points_of, spread
from cluster.results.findings import Measured
from cluster.stage.run_stage import fingerprint
from training.measuring.measures import PREDICTIONS_FILE
from training.reporting.report import print_table
from training.stage import EVALUATION_FILE

STAGED = """
run: {name: demo, directory: %s}
corpus: {world: {num_people: 20, num_values: 20}}
encoder: {tokenizer: {vocabulary: 400}}
training: {steps: 5}
stages:
  warm_start: {objective: {name: inverse_cloze}, training: {train: retriever_only}}
  reader: {run: {init_from: warm_start}, training: {train: generator_only}}
  joint: {run: {init_from: warm_start}, retrieval: {k: 3}}
"""
COMPARE = """
compare:
  base_stage: joint
  baseline: frozen
  seeds: [0, 1]
  cells:
    frozen: {training: {train: generator_only}, retrieval: {source: fixed}}
    warmed: {run: {init_from: reader}}
  axes:
    train: {both: , query_only: {training: {train: query_only}}}
    objective: {rag_sequence: , emdr2: {objective: {name: emdr2}}}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def experiment_of(write: Any, tmp_path: Path, *overrides: str, compare: str = COMPARE) -> Experiment:
    return load([write(STAGED % (tmp_path / "runs") + compare)], list(overrides))


# ---------------------------------------------------------------- configuration


def test_cells_are_the_base_stage_and_what_they_set(write, tmp_path: Path) -> None:
    matrix = experiment_of(write, tmp_path, "training.steps=7", "stages.joint.retrieval.k=2").matrix
    assert matrix is not None
    assert list(matrix.cells) == [
        *("frozen", "warmed", "both, rag_sequence", "both, emdr2", "query_only, rag_sequence", "query_only, emdr2")
    ]
    cells = matrix.cells
    assert (matrix.base_stage, matrix.baseline, matrix.seeds) == ("joint", "frozen", (0, 1))
    assert {cell.training.steps for cell in cells.values()} == {7}
    assert {cell.retrieval.k for cell in cells.values()} == {2}
    assert (cells["frozen"].training.train, cells["frozen"].retrieval.source) == ("generator_only", "fixed")
    crossed = cells["query_only, emdr2"]
    assert (crossed.training.train, crossed.objective.name) == ("query_only", "emdr2")
    assert (crossed.run.init_from, cells["warmed"].run.init_from) == ("warm_start", "reader")
    assert crossed.run.name == "demo/compare/query_only-emdr2"


def test_a_cell_wins_over_the_command_line_and_later_files_over_earlier_ones(write, tmp_path: Path) -> None:
    more = write("compare: {seeds: [4], cells: {frozen: {retrieval: {k: 1}}}}", "b.yaml")
    first = write(STAGED % tmp_path + COMPARE)
    matrix = load([first, more], ["stages.joint.training.train=both", "compare.seeds=[5, 6]"]).matrix
    assert matrix is not None
    assert matrix.seeds == (5, 6)
    assert (matrix.cells["frozen"].training.train, matrix.cells["frozen"].retrieval.k) == ("generator_only", 1)


def test_files_without_a_compare_section_have_no_matrix(write, tmp_path: Path) -> None:
    experiment = experiment_of(write, tmp_path, compare="")
    assert experiment.matrix is None
    with pytest.raises(ValueError, match=r"compare\.cells: the configuration has no compare section"):
        run_matrix(experiment)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compare: {bas_stage: joint}", "a.yaml: unknown setting compare.bas_stage. Did you mean compare.base_stage?"),
        ("compare: {cell: {}}", "unknown setting compare.cell. Did you mean compare.cells?"),
        (
            "compare: {cells: {a: {training: {stepz: 1}}}}",
            "Did you mean training.steps?",
        ),
        ("compare: {cells: {a: {retrieval: {k: x}}}}", "compare.cells.a.retrieval.k: value 'x' must be a whole number"),
        ("compare: {cells: [a]}", "compare.cells=['a']: must hold settings by name"),
        ("compare: {cells: {a: {training: {steps: 9}}}}", "compare.cells.a.training.steps: set it once, for all cells"),
        ("compare: {axes: {x: {a: {run: {seed: 1}}}}}", "compare.axes.x.a.run.seed: cells only set run.init_from"),
        ("compare: {cells: {a: , a: }}", "a.yaml:10: not YAML: duplicate key a"),
        ("compare: {base_stage: joint}", "compare.cells: needs cells"),
        ("compare: {base_stage: jiont, cells: {a: }}", "compare.base_stage=jiont: must name a stage"),
        ("compare: {base_stage: joint, baseline: frozn, cells: {frozen: }}", "Did you mean frozen?"),
        ("compare: {base_stage: joint, cells: {frozen: }}", "compare.baseline=: must name a cell: frozen."),
        ("compare: {base_stage: joint, baseline: a, cells: {a: }, seeds: [1, 1]}", "compare.seeds=[1, 1]: must be one"),
        ("compare: {base_stage: joint, baseline: a, cells: {a: }, seeds: []}", "compare.seeds=[]: must be one or more"),
        ("compare: {base_stage: joint, baseline: a, cells: {a: }, seeds: [x]}", "compare.seeds"),
        (
            "compare: {base_stage: joint, baseline: 'a, b', cells: {'a, b': }, axes: {x: {a: }, y: {b: }}}",
            "compare.cells.a, b: is a combination of compare.axes too",
        ),
        (
            "compare: {base_stage: joint, baseline: a-b, cells: {a-b: , 'a b': }}",
            "compare.cells.a b: would share the folder a-b with the cell 'a-b'",
        ),
        ("compare: {base_stage: joint, baseline: joint, cells: {joint: }}", "compare.cells=joint: must have a name"),
        (
            "compare: {base_stage: reader, baseline: a, cells: {a: {run: {init_from: joint}}}}",
            "compare cell a: run.init_from=joint: must be a stage before reader: warm_start",
        ),
        (
            "compare: {base_stage: joint, baseline: a, cells: {a: {retrieval: {source: fixed}}}}",
            "compare cell a: retrieval.source=fixed: must be index with training.train=both",
        ),
    ],
)
def test_mistakes_of_the_section(write, tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        experiment_of(write, tmp_path, compare=text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_become_folders() -> None:
    assert [folder_of(name) for name in ("both, emdr2", "k=4", "a/b", "..", "x")] == [
        "both-emdr2",
        "k-4",
        "a-b",
        "",
        "x",
    ]


# ---------------------------------------------------------------- running


class Runs:
    """Stands in for running a cell: writes what a stage leaves behind, and remembers what was run."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails, self.ran, self.started = fails, [], []

    def __call__(self, task: Task, data: Prepared, namespace: str) -> None:
        self.ran.append(f"{task.seed} {task.name}")
        self.started.append((task.settings.run.init_from, sorted(path.name for path in task.folder.iterdir())))
        assert data.passages.is_dir()
        if task.name in self.fails:
            raise RuntimeError(f"no luck with {task.name}\nand more")
        metrics = {} if task.name == "warm_start" else {"recall@1": 0.5 + 0.1 * task.seed, "exact_match": 0.25}
        result = {"fingerprint": fingerprint(task.settings), "metrics": metrics, "train_seconds": 2.0}
        (task.folder / EVALUATION_FILE).write_text(json.dumps(result), encoding="utf-8")
        rows = [{"id": f"q{i}", "recall@1": float(i < 2), "exact_match": float(i < 1)} for i in range(4)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (task.folder / PREDICTIONS_FILE).write_text(lines, encoding="utf-8")


def ran(experiment: Experiment, **options: Any) -> tuple[int, list[str]]:
    runs = Runs(**options)
    return run_matrix(experiment, runs), runs.ran


FIRST = [
    *("0 warm_start", "0 frozen", "0 reader", "0 warmed"),
    *("0 both, rag_sequence", "0 both, emdr2", "0 query_only, rag_sequence", "0 query_only, emdr2"),
]


def test_every_cell_is_run_once_and_its_start_once_a_seed(write, tmp_path: Path, capsys) -> None:
    experiment = experiment_of(write, tmp_path)
    runs = Runs()
    assert run_matrix(experiment, runs) == 0
    assert runs.ran == [*FIRST, *(name.replace("0 ", "1 ", 1) for name in FIRST)]
    root = tmp_path / "runs" / "demo" / "compare"
    assert runs.started[0][0] == ""
    assert runs.started[1][0] == str(root / "seed-0" / "warm_start")
    assert runs.started[3][0] == str(root / "seed-0" / "reader")
    assert runs.started[9][0] == str(root / "seed-1" / "warm_start")
    printed = capsys.readouterr().out
    assert "compare: 6 cells x 2 seeds; 16 of 16 runs to do" in printed
    assert "compare: 1/16 warm_start, seed 0: done, about " in printed
    assert "compare: 16/16 query_only, emdr2, seed 1: done\n" in printed
    content = json.loads((root / "comparison.json").read_text(encoding="utf-8"))
    assert content["cells"]["both, emdr2"]["metrics"]["recall@1"]["mean"] == pytest.approx(0.55)
    assert content["cells"]["both, emdr2"]["paired"]["recall@1"]["mean"] == 0.0
    assert content["failed"] == {}
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "objective.name=emdr2" in page
    # A second call runs nothing and says the same.
    before = (root / "comparison.json").read_bytes()
    assert ran(experiment) == (0, [])
    assert (root / "comparison.json").read_bytes() == before


def test_a_changed_cell_is_run_anew_and_only_that_one(write, tmp_path: Path) -> None:
    assert ran(experiment_of(write, tmp_path))[0] == 0
    folder = tmp_path / "runs" / "demo" / "compare" / "seed-0" / "both-emdr2"
    (folder / "left_over").touch()
    changed = COMPARE.replace("emdr2: {objective: {name: emdr2}}", "emdr2: {objective: {name: emdr2, weight: 2}}")
    experiment = experiment_of(write, tmp_path, compare=changed)
    code, names = ran(experiment)
    assert (code, names) == (0, ["0 both, emdr2", "0 query_only, emdr2", "1 both, emdr2", "1 query_only, emdr2"])
    assert not (folder / "left_over").exists()
    assert ran(experiment) == (0, [])


def test_a_changed_start_takes_what_follows_from_it_along(write, tmp_path: Path) -> None:
    one_seed = ("compare.seeds=[0]",)
    assert ran(experiment_of(write, tmp_path, *one_seed))[0] == 0
    _, names = ran(experiment_of(write, tmp_path, *one_seed, "stages.reader.training.lr_generator=0.1"))
    assert names == ["0 reader", "0 warmed"]
    _, names = ran(experiment_of(write, tmp_path, *one_seed, "stages.warm_start.training.lr_retriever=0.1"))
    assert names == FIRST


def test_what_an_interrupted_run_left_is_kept(write, tmp_path: Path) -> None:
    experiment = experiment_of(write, tmp_path, "compare.seeds=[0]")
    ran(experiment)
    folder = tmp_path / "runs" / "demo" / "compare" / "seed-0" / "frozen"
    (folder / EVALUATION_FILE).unlink()
    (folder / "checkpoints").mkdir()
    runs = Runs()
    run_matrix(experiment, runs)
    assert runs.ran == ["0 frozen"]
    assert "checkpoints" in runs.started[0][1]


def test_a_failing_cell_is_reported_and_the_others_go_on(write, tmp_path: Path, capsys) -> None:
    experiment = experiment_of(write, tmp_path, "compare.seeds=[0]")
    code, names = ran(experiment, fails=("both, emdr2",))
    assert (code, names) == (1, FIRST)
    printed = capsys.readouterr().out
    assert "both, emdr2, seed 0: FAILED: RuntimeError: no luck with both, emdr2" in printed
    assert "failed: both, emdr2, seed 0: RuntimeError: no luck with both, emdr2" in printed
    root = tmp_path / "runs" / "demo" / "compare"
    content = json.loads((root / "comparison.json").read_text(encoding="utf-8"))
    assert content["failed"] == {"both, emdr2": {"0": "RuntimeError: no luck with both, emdr2"}}
    assert content["cells"]["both, emdr2"]["seeds"] == []
    assert content["cells"]["query_only, emdr2"]["seeds"] == [0]
    assert "and more" in (root / "seed-0" / "both-emdr2" / "error.log").read_text(encoding="utf-8")
    assert ran(experiment) == (0, ["0 both, emdr2"])


def test_nothing_runs_on_a_start_that_failed(write, tmp_path: Path) -> None:
    experiment = experiment_of(write, tmp_path, "compare.seeds=[0]")
    code, names = ran(experiment, fails=("reader",))
    assert code == 1
    assert "0 warmed" not in names
    assert "0 both, emdr2" in names
    content = json.loads((tmp_path / "runs" / "demo" / "compare" / "comparison.json").read_text(encoding="utf-8"))
    assert content["failed"]["warmed"] == {"0": "not run: reader, which it starts from, failed"}


def test_an_interruption_leaves_the_comparison_of_what_there_is(write, tmp_path: Path) -> None:
    class Interrupted(Runs):
        def __call__(self, task: Task, data: Prepared, namespace: str) -> None:
            super().__call__(task, data, namespace)
            if task.name == "frozen":
                raise KeyboardInterrupt

    experiment = experiment_of(write, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(experiment, Interrupted())
    content = json.loads((tmp_path / "runs" / "demo" / "compare" / "comparison.json").read_text(encoding="utf-8"))
    assert {cell: values["seeds"] for cell, values in content["cells"].items() if values["seeds"]} == {"frozen": [0]}


def test_mistakes_of_a_cell_are_seen_before_anything_runs(write, tmp_path: Path) -> None:
    for own, expected in (
        ("encoder: {name: /no/such/folder}", "compare cell a: encoder.name=/no/such/folder: must be a folder"),
        ("retrieval: {k: 500}", "compare cell a: retrieval.k=500: must be 1 to 120"),
        ("run: {init_from: no/such/run}", "compare cell a: run.init_from=no/such/run: must be a checkpoint"),
    ):
        text = f"compare: {{base_stage: joint, baseline: a, cells: {{a: {{{own}}}}}}}"
        runs = Runs()
        with pytest.raises(ValueError, match=expected.replace("(", "\\(")):
            run_matrix(experiment_of(write, tmp_path, compare=text), runs)
        assert runs.ran == []


# ---------------------------------------------------------------- arithmetic


def measured(values: dict[str, float | None], mean: float | None = None) -> Measured:
    """Recall@1 by question id."""
    rows = [{"id": id, "recall@1": value} for id, value in values.items()]
    known = [value for value in values.values() if value is not None]
    metrics = {"recall@1": float(np.mean(known)) if mean is None else mean}
    return Measured("x", {"metrics": metrics, "train_seconds": 3.0}, rows)


def test_mean_and_spread_by_hand() -> None:
    results = {
        "a": {0: measured({"x": 1.0, "y": 0.0}), 1: measured({"x": 1.0, "y": 1.0})},  # .5 and 1
        "b": {0: measured({"x": 0.0, "y": 0.0})},
    }
    found = compare_cells(results, "b")
    assert found["a"]["metrics"]["recall@1"]["mean"] == 0.75
    assert found["a"]["metrics"]["recall@1"]["sd"] == pytest.approx(0.3535534)  # .5 / sqrt(2)
    assert found["a"]["metrics"]["recall@1"]["per_seed"] == {"0": 0.5, "1": 1.0}
    assert found["b"]["metrics"]["recall@1"]["sd"] is None
    assert (found["a"]["train_seconds"], found["b"]["paired"]) == (3.0, {})
    assert found["a"]["paired"]["recall@1"]["mean"] == 0.5  # of seed 0, the one that both have
    assert compare_cells({"a": {}}, "a")["a"]["train_seconds"] is None
    assert spread([0.2, 0.4, 0.6]) == pytest.approx(0.2)


def test_paired_differences_by_hand() -> None:
    cell = {
        0: measured({"x": 1.0, "y": 1.0, "z": 0.0, "only_here": 1.0}),
        1: measured({"x": 1.0, "y": 0.0, "z": 1.0}),
    }
    base = {
        0: measured({"x": 0.0, "y": 1.0, "z": 1.0}),
        1: measured({"x": 0.0, "y": 0.0, "z": 0.0, "unknown": None}),
        2: measured({"x": 1.0, "y": 1.0, "z": 1.0}),
    }
    found = paired_to(cell, base)["recall@1"]
    # x: +1 and +1; y: 0 and 0; z: -1 and +1. Seeds: 0 and 2/3.
    assert found["num_questions"] == 3
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["per_seed"] == {"0": pytest.approx(0.0), "1": pytest.approx(2 / 3)}
    assert found["sd"] == pytest.approx((2 / 3) / 2**0.5)
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1  # questions' means are 1, 0 and 0
    assert paired_to(cell, {}) == {}
    assert paired_to({0: measured({"x": 1.0})}, {0: measured({"y": 1.0})}) == {}


def test_the_table_has_a_row_for_every_cell(write, tmp_path: Path) -> None:
    matrix = experiment_of(write, tmp_path).matrix
    assert matrix is not None
    matrix = replace(matrix, baseline="b")
    results = {"a": {0: measured({"x": 1.0, "y": 0.0}, mean=0.5)}, "b": {0: measured({"x": 0.0, "y": 0.0})}, "c": {}}
    cells = compare_cells(results, "b")
    table = comparison_table(cells, matrix, {("c", 0): "ValueError: no"})
    assert [row[:6] for row in table.rows] == [
        ["a", 1, 0.5, None, "+0.500", "+0.000 to +1.000"],
        ["b", 1, 0.0, None, None, None],
        ["c", 0, None, None, None, None],
    ]
    assert "failed: c, seed 0: ValueError: no" in print_table(table)
    points = points_of(cells, "b")
    assert points.series == {"recall@1": [(0.5, 0.0), (0.0, 0.0), None]}
