"""Describes the state of one shard, as the coordinator reads it."""

from dataclasses import dataclass, field

from indexing.dense.probe import UNKNOWN, Figures
from indexing.shard.long_steps import LongStep
from indexing.shard.staging import StagingStatus


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """A view of one shard. -1 stands for no generation."""

    shard_number: int
    start: int  # first passage number
    stop: int  # after the last; of the base corpus
    committed: int  # newest committed generation
    generations: dict[int, int]  # served generation -> weights version
    in_flight: int  # searches and saves under way
    building: StagingStatus | None = None  # the generation that is being staged to be built
    deriving: StagingStatus | None = None  # the generation that is being staged to be derived from another one
    corpora: dict[int, int] = field(default_factory=dict)  # served generation -> corpus version
    hidden: int = 0  # corpus version up to which deleted passages are not returned
    num_living: int = 0  # passages of the newest generation that may be returned
    oldest_version: int = -1  # weights version of the passage of the newest generation that was encoded longest ago
    figures: Figures = UNKNOWN  # of the newest committed generation
    steps: tuple[LongStep, ...] = ()  # long ones that are under way, the oldest first

    @property
    def staged(self) -> list[StagingStatus]:
        """Return the generations that are being staged: none, one to be built, one to be derived, or both in this
        order."""
        return [staging for staging in (self.building, self.deriving) if staging is not None]
