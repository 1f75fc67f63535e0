"""Train a retriever and a generator as one system, and ask what was trained.

    import tandem

    run = tandem.train("configs/quickstart.yaml", "run.seed=1")
    print(run.ask("Who wrote it?").text)

Importing this package imports neither torch nor Ray; they are imported when they are needed.
"""

from importlib.metadata import version

from cluster.commands.answer import Answer, Passage
from cluster.config.settings import Settings
from tandem.results import Difference, Results, Update
from tandem.run import Corpus, Run, load, train

__version__ = version("tandem-rag")
__all__ = [
    "Answer",
    "Corpus",
    "Difference",
    "Passage",
    "Results",
    "Run",
    "Settings",
    "Update",
    "__version__",
    "load",
    "train",
]
