"""The command line. Answers help and mistakes before anything heavy is imported; the work of a
verb starts in `cluster/commands`.

Exit codes: 0 done, 1 failed, 2 a mistake in the command or the configuration, 130 stopped by Ctrl-C, 143 by another
signal.
"""

import contextlib
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.setting_names import describe_settings, find_settings
from cluster.config.verbs import DEFAULT_VERB, VERBS, overview, verb_help
from cluster.machines import stopping
from cluster.machines.output import make_lasting

if TYPE_CHECKING:
    from cluster.config.experiment import Experiment


NOTHING_SAVED = "the same command goes on from the last checkpoint, if there is one"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Writes "done" to the file that TANDEM_DONE_FILE names after success,
    for launchers whose own exit code says nothing."""
    if arguments is None:
        stopping.install()
        make_lasting()
        arguments = sys.argv[1:]
    code = _command(arguments)
    done_file = os.environ.get("TANDEM_DONE_FILE")
    if code == 0 and done_file:
        Path(done_file).write_text("done\n", encoding="utf-8")
    return code


def _command(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else (DEFAULT_VERB, [])
    if verb in ("--help", "-h", "help"):
        return _print(overview())
    if verb not in VERBS:
        return _mistake(_unknown_verb(verb))
    asked = rest[:1] if verb == "test" else rest
    if "--help" in asked or "-h" in asked:
        return _print(verb_help(verb))
    match verb:
        case "test":
            from cluster.commands import checks

            return guarded(lambda: checks.run(rest), None)
        case "settings":
            return _settings(rest)
        case "corpus":
            return _corpus(rest)
        case _:
            return _work(verb, rest)


def _settings(rest: list[str]) -> int:
    """Run the verb that lists settings."""
    if len(rest) > 1:
        return _mistake("settings takes one pattern at most: tandem settings [PATTERN]")
    try:
        return _print(describe_settings(find_settings(rest[0] if rest else "")))
    except ValueError as error:
        return _mistake(str(error))


def _corpus(rest: list[str]) -> int:
    """Run the verb that names a run and what to change in it."""
    from cluster.prepare import corpus_changes

    try:
        command = corpus_changes.parse(rest)
        folder = Path(command.run)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"corpus {command.action}: {folder} is no run folder (it has no config.yaml)")
        experiment = read_experiment([command.run])
    except ValueError as error:
        return _mistake(str(error))
    settings = experiment.last
    return guarded(lambda: corpus_changes.run(command, settings, folder), folder)


def _work(verb: str, rest: list[str]) -> int:
    """Run a verb that reads a configuration."""
    questions: list[str] = []
    if verb == "ask":
        if not rest or not rest[0].strip() or rest[0].endswith((".yaml", ".yml")):
            return _mistake('ask needs a question first: tandem ask "question" [config.yaml ...]')
        questions, rest = split_questions(rest)
    flag = {"plan": "--json", "show": "--changed"}.get(verb)
    flagged = flag in rest
    try:
        experiment = read_experiment([argument for argument in rest if argument != flag])
        if verb not in ("plan", "show"):
            check_named_paths(verb, experiment)
    except ValueError as error:
        return _mistake(str(error))
    stopping.set_limit(experiment.last.cluster.stop_timeout_s)
    if verb == "show":
        return _print(changed(experiment) if flagged else show(experiment))
    if verb == "plan":
        from cluster.planning import plan

        return guarded(lambda: plan.run(experiment, flagged), None)
    return guarded(lambda: _run(verb, experiment, questions), experiment.directory)


def split_questions(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the first argument with those that put the same question otherwise, and the rest. A phrasing is
    several words that are neither a file nor a setting."""

    def is_phrasing(argument: str) -> bool:
        setting = re.match(r"[a-z_][\w.]*=", argument)
        return len(argument.split()) > 1 and setting is None and not Path(argument).exists()

    more = [argument for argument in arguments[1:] if is_phrasing(argument)]
    return [arguments[0], *more], [argument for argument in arguments[1:] if argument not in more]


def read_experiment(arguments: list[str]) -> "Experiment":
    """Return the experiment that files and overrides among `arguments` describe. Raises ValueError."""
    from cluster.config.experiment import load

    options = [argument for argument in arguments if argument.startswith("-")]
    if options:
        raise ValueError(f"unknown option {options[0]}; settings are section.field=value, see --help")
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    return load([argument for argument in arguments if argument not in overrides], overrides)


def check_named_paths(verb: str, experiment: "Experiment") -> None:
    """Refuse what a verb would look for in vain, before torch is imported. Raises ValueError."""
    from cluster.config.paths import check_paths, check_trained

    if verb in ("index", "evaluate", "ask"):
        check_trained(experiment.last, experiment.directory)
    if verb not in ("train", "prepare", "compare") or experiment.settings.cluster.dry_run:
        return
    starts = {str(Path(stage.run.directory) / stage.run.name) for stage in experiment.stages.values()}
    cells = experiment.matrix.cells if verb == "compare" and experiment.matrix is not None else {}
    named = {f"compare cell {cell}": stage for cell, stage in cells.items()}
    for name, stage in {**experiment.stages, **named}.items():
        try:
            check_paths(stage, experiment.directory, {*starts, *experiment.stages})
        except ValueError as error:
            where = "" if not name else f"{name}: " if name.startswith("compare cell ") else f"stage {name}: "
            raise ValueError(f"{where}{error}") from None


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
    """Return the resolved configuration of every stage as YAML documents, each under a comment with its run folder."""
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


def changed(experiment: "Experiment") -> str:
    """Return what differs from the defaults, as one YAML file that can be loaded."""
    from cluster.config.experiment import changes_to_yaml

    return changes_to_yaml(experiment).rstrip()


def guarded(work: Callable[[], int | None], directory: Path | None) -> int:
    """Run `work` and turn what it raises into one line and an exit code; the traceback goes to error.log in
    `directory`, or where that does not exist to a temporary file."""
    try:
        return work() or 0
    except stopping.Interrupted as signal:
        where = f"saved {signal.saved}; the same command goes on there" if signal.saved else NOTHING_SAVED
        print(f"tandem: stopped by {signal}: {where}", file=sys.stderr)
        return signal.exit_code
    except KeyboardInterrupt:  # of a caller that left the signals alone
        print(f"tandem: interrupted: {NOTHING_SAVED}", file=sys.stderr)
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


def _print(text: str) -> int:
    print(text, flush=True)
    return 0


def _mistake(sentence: str) -> int:
    print(f"tandem: {sentence}", file=sys.stderr)
    return 2


def _unknown_verb(verb: str) -> str:
    if verb.endswith((".yaml", ".yml")) or "=" in verb:
        return f"{verb} is no verb. Did you mean: {DEFAULT_VERB} {verb}"
    near = get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown verb {verb}.{hint} Verbs: {', '.join(VERBS)}"


def _indent(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
