"""A worker with too little memory: `python poor_worker.py FILE python -m ...worker FD`.

It is the worker that the rest of the command starts, but for batches of more tokens than FILE says
(JSON, read at each batch: `most_tokens`), and batches that hold the token `poison`: those find no
memory.
"""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from stallfree.executor.step import Step
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.executor.worker import _end_with_parent, main


def be_poor(file: Path) -> None:
    """Have batches fail as FILE says."""
    forward = TorchExecutor.forward

    def failing(self: TorchExecutor, step: Step, hidden: torch.Tensor | None = None) -> Any:
        limits = json.loads(file.read_text())
        token_ids = step.input.token_ids
        if len(token_ids) > limits["most_tokens"] or limits["poison"] in token_ids:
            raise MemoryError(f"no memory for {len(token_ids)} tokens")
        return forward(self, step, hidden)

    TorchExecutor.forward = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    be_poor(Path(sys.argv[1]))
    _end_with_parent()
    main(Connection(int(sys.argv[-1])))
