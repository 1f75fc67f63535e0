"""Detects a collapse: training makes retrieval worse than it was at the start of the stage.

A distillation objective follows its generator: a generator that cannot read yet teaches noise, and the retriever may
end where every passage scores alike or one wrong passage takes all. Two signs are watched. First, recall of the brief
evaluations (mean over the cut-offs measured) falls below that of the first one. Second, p(z|q) becomes uniform or a
single passage, without more labelled passages among the K than at the start. A retriever that is sure and right has low
entropy, too; that is no collapse.
"""

import math
from dataclasses import dataclass, field

from training.training_settings import ObjectiveConfig

WINDOW_STEPS = 20  # Number of steps whose mean is compared
EXTREME = 0.01  # Share of log(k) from either end that counts as single passage or as uniform
RECALL_LOSS = 0.02  # Recall below the start's that is a collapse
STALE = 1.5  # Refresh intervals after which the age of hits is named as a cause


class Collapsed(ValueError):
    """Retrieval collapsed and training.on_collapse=stop. Another attempt from the last checkpoint would end alike."""


def remedy(objective: ObjectiveConfig, staleness: float, refresh_every: int) -> str:
    """Return advice against a collapse: sentences without a full stop at the end. `staleness` of the hits is in
    steps."""
    advice = []
    if staleness > STALE * refresh_every > 0:
        late = f"The hits are of weights {staleness:.0f} steps old"
        advice.append(f"{late}: bound that (refresh.max_staleness_steps) or encode faster (refresh.num_workers)")
    if objective.name in ("pdist", "loop", "adist") and not objective.confidence:
        advice.append("Let a question count by how sure the generator is (objective.confidence=true)")
    elif objective.name in ("reinforce", "grpo") and objective.advantage != "centered":
        advice.append("Let a question count by how much its rewards differ (objective.advantage=centered)")
    advice.append("Warm up the generator (training.retriever_delay_steps), lower training.lr_retriever")
    return ". ".join(advice)


@dataclass
class Window:
    """Sums over the steps since the last comparison."""

    entropy: float = 0.0  # Share of its maximum, summed
    gold: float = 0.0
    counted: int = 0  # Number of steps whose entropy was finite
    steps: int = 0


@dataclass
class CollapseDetector:
    """Compares with the start of the stage. `start` is part of the checkpoint; each sign is reported once."""

    start: dict[str, float]
    window: Window = field(default_factory=Window)
    reported: set[str] = field(default_factory=set)

    def after_step(self, entropy: float, k: int, gold: float) -> str | None:
        """Return what is wrong at the end of a window of steps; None otherwise. `entropy` is the mean of p(z|q) in nats
        over `k` passages, `gold` the share of questions with a labelled passage among them (0 without labels)."""
        window = self.window
        window.steps += 1
        if k > 1 and math.isfinite(entropy):
            window.entropy += entropy / math.log(k)
            window.gold += gold
            window.counted += 1
        if window.steps < WINDOW_STEPS:
            return None
        self.window = Window()
        if not window.counted:
            return None
        share, gold = window.entropy / window.counted, window.gold / window.counted
        if "entropy" not in self.start:
            self.start |= {"entropy": share, "gold": gold}
        first, first_gold = self.start["entropy"], self.start["gold"]
        if gold >= max(first_gold - RECALL_LOSS, 0.5):  # it finds the labelled passages
            return None
        if share > 1 - EXTREME and first <= 1 - EXTREME:
            return self._once(
                "uniform", f"p(z|q) is uniform (entropy {share:.3f} of its maximum, {first:.3f} at first)"
            )
        if share < EXTREME and first >= EXTREME and gold <= first_gold + RECALL_LOSS:
            return self._once("single", f"one passage takes all of p(z|q) (entropy {share:.3f} of its maximum)")
        return None

    def after_evaluation(self, metrics: dict[str, float]) -> str | None:
        """Return what is wrong with an evaluation's ranking; None otherwise, and for the first one, which is the
        start."""
        measured = [value for name, value in metrics.items() if name.startswith("recall@") and math.isfinite(value)]
        if not measured:
            return None
        recall = sum(measured) / len(measured)
        first = self.start.setdefault("recall", recall)
        if recall < first - RECALL_LOSS:
            return self._once("recall", f"recall fell to {recall:.3f} from {first:.3f} at the start")
        return None

    def _once(self, sign: str, text: str) -> str | None:
        if sign in self.reported:
            return None
        self.reported.add(sign)
        return text
