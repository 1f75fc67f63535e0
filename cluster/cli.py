"""The command line. Answers help and mistakes before anything heavy is imported; the work of a
verb starts in `cluster/commands`.

Exit codes: 0 done, 1 failed, 2 a mistake in the command or the configuration, 130 interrupted.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config.experiment import Experiment

VERBS = {
    "train": "train every stage, from where an earlier call of the same run stopped",
    "prepare": "read, check and tokenise corpus and questions into the store",
    "index": "encode the corpus with a trained encoder and build the index",
    "evaluate": "measure a trained system on the evaluation questions; with update.as_of=DATE after that update too",
    "compare": "run the matrix of the file's compare section, cell by cell, and write one table",
    "corpus": "add, delete or update passages of a run, while it trains or afterwards: corpus add RUN new.jsonl",
    "ask": 'answer one question: ask "question" ["put otherwise" ...] [config.yaml ...]',
    "plan": "does a run fit, on what, how stale is its index, what does it cost; starts nothing (--json: numbers only)",
    "show": "print the resolved configuration of every stage and where its run lies",
    "test": "run every check: lint, format, types, import rules, tests; what follows goes to pytest",
}
DEFAULT_VERB = "train"

HELP = """usage: tandem [VERB] [config.yaml | run folder ...] [section.field=value ...]

Trains a retriever and a generator as one system, with the index of the whole corpus refreshed beside the training.

{verbs}

Without a verb: train. Without a file: configs/quickstart.yaml. Later files win over earlier ones, section.field=value
over all (run.init_from: where the first stages start); stages.NAME.section.field=value is for one stage. Runs lie in
runs/<run.name>/.

examples:
  tandem train configs/quickstart.yaml run.seed=1
  tandem train configs/quickstart.yaml training.steps=50 stages.joint.retrieval.k=8
  tandem evaluate runs/quickstart/joint update.as_of=end evaluation.also=[gold,closed_book]
  tandem compare configs/compare_quickstart.yaml compare.seeds=[0]
  tandem plan configs/cluster_nq.yaml plan.gpu=h100 plan.passages=21000000
  tandem show configs/quickstart.yaml
  tandem corpus add runs/quickstart/joint new.jsonl
  tandem corpus delete runs/quickstart/joint some-id another-id
  tandem ask "Who wrote it?" configs/quickstart.yaml
  tandem ask "Who wrote it?" "Name of the author?" configs/quickstart.yaml"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Writes "done" to the file that TANDEM_DONE_FILE names after success,
    for launchers whose own exit code says nothing."""
    if arguments is None:
        signal.signal(signal.SIGTERM, _terminated)
        arguments = sys.argv[1:]
    code = _command(arguments)
    done_file = os.environ.get("TANDEM_DONE_FILE")
    if code == 0 and done_file:
        Path(done_file).write_text("done\n", encoding="utf-8")
    return code


def _command(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else (DEFAULT_VERB, [])
    if verb in ("--help", "-h", "help"):
        print(_help())
        return 0
    if verb not in VERBS:
        return _mistake(_unknown_verb(verb))
    if verb == "test":
        from cluster.commands import checks

        if rest[:1] in (["--help"], ["-h"]):
            print(f"usage: tandem test [pytest options]\n\n{VERBS['test']}")
            return 0
        return guarded(lambda: checks.run(rest), None)
    if any(argument in ("--help", "-h") for argument in rest):
        print(_help())
        return 0
    if verb == "corpus":
        return _corpus(rest)
    return _work(verb, rest)


def _corpus(rest: list[str]) -> int:
    """The verb that names a run and what to change in it."""
    from cluster.prepare import corpus_changes

    try:
        command = corpus_changes.parse(rest)
        folder = Path(command.run)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"corpus {command.action}: {folder} is no run folder (it has no config.yaml)")
        experiment = read_experiment([command.run])
    except ValueError as error:
        return _mistake(str(error))
    settings = list(experiment.stages.values())[-1]
    return guarded(lambda: corpus_changes.run(command, settings, experiment.directory, folder), folder)


def _work(verb: str, rest: list[str]) -> int:
    """A verb that reads a configuration."""
    questions: list[str] = []
    if verb == "ask":
        if not rest or not rest[0].strip() or rest[0].endswith((".yaml", ".yml")):
            return _mistake('ask needs a question first: tandem ask "question" [config.yaml ...]')
        questions, rest = split_questions(rest)
    only_json = verb == "plan" and "--json" in rest
    try:
        experiment = read_experiment([argument for argument in rest if argument != "--json" or not only_json])
    except ValueError as error:
        return _mistake(str(error))
    if verb == "show":
        with contextlib.suppress(BrokenPipeError):
            print(show(experiment), flush=True)
        return 0
    if verb == "plan":
        from cluster.planning import plan

        return guarded(lambda: plan.run(experiment, only_json), None)
    return guarded(lambda: _run(verb, experiment, questions), experiment.directory)


def split_questions(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The first argument, with the further ones that put the same question otherwise, and the rest. A phrasing is
    several words that are neither a file nor a setting."""

    def is_phrasing(argument: str) -> bool:
        setting = re.match(r"[a-z_][\w.]*=", argument)
        return len(argument.split()) > 1 and setting is None and not Path(argument).exists()

    more = [argument for argument in arguments[1:] if is_phrasing(argument)]
    return [arguments[0], *more], [argument for argument in arguments[1:] if argument not in more]


def read_experiment(arguments: list[str]) -> "Experiment":
    """The experiment that files and overrides among `arguments` describe. Raises ValueError."""
    from cluster.config.experiment import load

    options = [argument for argument in arguments if argument.startswith("-")]
    if options:
        raise ValueError(f"unknown option {options[0]}; settings are section.field=value, see --help")
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    return load([argument for argument in arguments if argument not in overrides], overrides)


def _run(verb: str, experiment: "Experiment", questions: list[str]) -> int | None:
    from cluster.machines import session

    session.set_environment()  # Ray reads it when it is imported
    from cluster.commands import train

    match verb:
        case "prepare":
            return train.prepare(experiment)
        case "index":
            return train.index(experiment)
        case "evaluate":
            return train.evaluate(experiment)
        case "compare":
            return train.compare(experiment)
        case "ask":
            return train.ask(experiment, questions)
        case _:
            return train.train(experiment)


def show(experiment: "Experiment") -> str:
    """The resolved configuration of every stage as YAML documents, each under a comment with its run folder."""
    from cluster.config.experiment import to_yaml

    parts: list[str] = []
    for name, settings in experiment.stages.items():
        folder = Path(settings.run.directory) / settings.run.name
        parts.append(f"# {f'stage {name}: ' if name else ''}{folder}\n{to_yaml(settings)}")
    if experiment.update.as_of:
        parts.append(f"# after the last stage\nupdate:\n{_indent(to_yaml(experiment.update))}")
    if experiment.matrix is not None:
        cells = "".join(f"#   {name}: {s.run.directory}/{s.run.name}\n" for name, s in experiment.matrix.cells.items())
        parts.append(f"# compare, with seeds {', '.join(map(str, experiment.matrix.seeds))}\n{cells}")
    return "---\n".join(parts).rstrip()


def guarded(work: Callable[[], int | None], directory: Path | None) -> int:
    """Run `work` and turn what it raises into one line and an exit code; the traceback goes to error.log in
    `directory`, or where that does not exist to a temporary file."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("tandem: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray wraps what a remote call raised, and makes it many lines long
        shown = cause if isinstance(cause, Exception) else error
        log = _write_traceback(error, directory)
        if isinstance(shown, ValueError):
            return _mistake(str(shown))
        sentence = next((line for line in str(shown).splitlines() if line.strip()), "no message")
        print(f"tandem: failed: {type(shown).__name__}: {sentence.strip()} (traceback: {log})", file=sys.stderr)
        return 1


def _terminated(number: int, frame: object) -> None:
    """SIGTERM ends the work as Ctrl-C does: what was started is stopped on the way out."""
    raise KeyboardInterrupt


def _write_traceback(error: Exception, directory: Path | None) -> Path:
    text = "".join(traceback.format_exception(error))
    if directory is not None and directory.is_dir():
        with contextlib.suppress(OSError):
            log = directory / "error.log"
            log.write_text(text, encoding="utf-8")
            return log
    with tempfile.NamedTemporaryFile("w", prefix="tandem-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name)


def _mistake(sentence: str) -> int:
    print(f"tandem: {sentence}", file=sys.stderr)
    return 2


def _unknown_verb(verb: str) -> str:
    if verb.endswith((".yaml", ".yml")) or "=" in verb:
        return f"{verb} is no verb. Did you mean: {DEFAULT_VERB} {verb}"
    near = get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown verb {verb}.{hint} Verbs: {', '.join(VERBS)}"


def _help() -> str:
    return HELP.format(verbs="\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items()))


def _indent(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
