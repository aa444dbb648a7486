"""Standard output that a run outlives: a closed pipe, a terminal that is gone, a full disk."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast


class LastingOutput:
    """Writes to a stream until that fails, from then on to nowhere; a run logs to its folder too.

    Args:
        stream: of text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Characters written, or dropped."""
        try:
            return self._stream.write(text)
        except OSError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        # The file itself, because what the stream still holds is written when Python ends.
        with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """The same stream, whose failing ends nothing."""
    return cast("TextIO", LastingOutput(stream))
