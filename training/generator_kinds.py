"""The kinds of generator, and the facts about each by which settings are checked, prompts made and runs planned."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GeneratorKind:
    """The facts about one kind of generator that hold whatever its weights are."""

    meaning: str  # completes "Kind of generator:"
    checkpoint: Literal["encoder", "encoder_decoder", "causal"]  # architecture of the model that generator.name names
    adapters: bool = True  # True if the checkpoint takes LoRA adapters
    score_bias: bool = True  # True if a score may be added to the attention to each passage

    @property
    def one_sequence(self) -> bool:
        """Return True if passages, question and answer are one sequence, written by `generator.template`."""
        return self.checkpoint == "causal"

    @property
    def encoder_decoder(self) -> bool:
        """Return True if the checkpoint has an encoder that reads and a decoder that writes."""
        return self.checkpoint == "encoder_decoder"


GENERATOR_KINDS = {
    "copy": GeneratorKind(meaning="small, with a copy head", checkpoint="encoder", adapters=False),
    "fusion": GeneratorKind(meaning="any encoder-decoder", checkpoint="encoder_decoder"),
    "causal": GeneratorKind(meaning="any causal language model", checkpoint="causal", score_bias=False),
}


def kinds_in_words() -> str:
    """Return every kind with its meaning, for the help."""
    return ", ".join(f"{name} ({kind.meaning})" for name, kind in GENERATOR_KINDS.items())
