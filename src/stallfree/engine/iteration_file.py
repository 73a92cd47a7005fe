"""What each iteration held and took, one line of CSV each: what `stallfree simulate --times` reads.

Unlike a profile it holds all that serving costs: the processor's share of HTTP and of clients, and
whatever else ran there.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from stallfree.core.batch import Batch
from stallfree.core.step_time import BatchShape
from stallfree.errors import ConfigError

COLUMNS = ("seconds", "prefill_tokens", "prefill_context", "decodes", "decode_context", "sampled")


class IterationFile:
    """Opened for each line, so that it is whole whenever it is read, and nothing is to be closed.

    Args:
        path: of the file; what was there before is gone.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    def write(self, batch: Batch, seconds: float) -> None:
        """Add an iteration; a disk that is full stops nobody."""
        shape = BatchShape.of(batch)
        decodes = sum(chunk.is_decode for chunk in batch.chunks)
        context = round(shape.decode_context / decodes) if decodes else 0
        tokens = shape.num_tokens - decodes
        row = (f"{seconds:.6f}", tokens, shape.prefill_context, decodes, context, shape.num_sampled)
        line = (",".join(map(str, row)) + "\n").encode()
        with suppress(OSError), self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)  # rather no line than half of one
