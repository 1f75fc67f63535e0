"""Standard output that does not end the run: without a reader (`| head -1`), or with a character it cannot print."""

import io
import os
import sys


class LastingOutput(io.TextIOWrapper):
    """A text stream that goes on into nothing when its reader has gone, and escapes what its encoding lacks."""

    def write(self, text: str) -> int:
        """Write `text`; returns the number of its characters, also where nobody reads them."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            super().flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def make_lasting() -> None:
    """Replace the standard streams of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, LastingOutput):
            encoding, lines = stream.encoding, stream.line_buffering
            lasting = LastingOutput(stream.detach(), encoding, "backslashreplace", line_buffering=lines)
            setattr(sys, name, lasting)
