"""What each iteration held and took, one line of CSV each: what `stallfree simulate --times` reads.

Unlike a profile it holds all that serving costs: the processor's share of HTTP and of clients, and
whatever else ran there.
"""

from __future__ import annotations

from pathlib import Path

from stallfree.core.batch import Batch
from stallfree.core.step_time import BatchShape
from stallfree.errors import ConfigError
from stallfree.executor.line_file import LineFile

COLUMNS = ("seconds", "prefill_tokens", "prefill_context", "decodes", "decode_context", "sampled")


class IterationFile:
    """A line for each iteration; one for which there is no room is left out.

    Args:
        path: of the file; what was there before is gone.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = LineFile(path, ",".join(COLUMNS) + "\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    def write(self, batch: Batch, seconds: float) -> None:
        """Add an iteration."""
        shape = BatchShape.of(batch)
        decodes = sum(chunk.is_decode for chunk in batch.chunks)
        context = round(shape.decode_context / decodes) if decodes else 0
        tokens = shape.num_tokens - decodes
        row = (f"{seconds:.6f}", tokens, shape.prefill_context, decodes, context, shape.num_sampled)
        self._file.add(",".join(map(str, row)) + "\n")
