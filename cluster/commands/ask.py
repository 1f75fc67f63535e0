"""Runs the verb `ask`: answers one question, put in one or several ways, from a checkpoint in this process."""

from collections.abc import Sequence
from pathlib import Path

from cluster.commands.answer import printed
from cluster.commands.loaded_run import LoadedRun
from cluster.config.settings import Settings


def answer_question(settings: Settings, root: Path, checkpoint: str, questions: Sequence[str]) -> str:
    """Return the answer to the first of `questions` with the passages that were read, as text; the others are further
    ways of putting it. Raises ValueError without a question."""
    if not questions or not all(question.strip() for question in questions):
        raise ValueError("ask needs a question")
    answer = LoadedRun(settings, root, checkpoint).ask(questions)
    return printed(answer, settings.retrieval.hybrid != "none")
