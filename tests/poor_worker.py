"""A worker with too little memory: `python poor_worker.py FILE python -m ...worker FD`.

It is the worker that the rest of the command starts, but for batches of more tokens than FILE says
(JSON, read at each batch: `most_tokens`), and batches that hold the token `poison`: those find no
memory at a `place`. One of them is where a process that failed makes up for what its peers wait
for; it then fails before its layers too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from stallfree.executor import torch_executor
from stallfree.executor.step import Step
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.executor.worker import _end_with_parent, main
from stallfree.model.decoder import Decoder
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.peers import GroupPeers


def _always(*_: Any) -> bool:
    return True


PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "layer": (Decoder, "_mlp", lambda own, layer, _: layer is own._layers[-1]),
    "scratch": (Int8Decoder, "_reserve", _always),
    "logits": (Decoder, "logits", _always),
    "sampling": (torch_executor, "sample", _always),
    "making up": (GroupPeers, "make_up", _always),
}


def be_poor(file: Path) -> None:
    """Have batches fail as FILE says."""
    struck: list[str] = []  # where the batch fails
    forward = TorchExecutor.forward

    def failing_forward(
        self: TorchExecutor, step: Step, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        limits, token_ids = json.loads(file.read_text()), step.input.token_ids
        struck.clear()
        if len(token_ids) > limits["most_tokens"] or limits["poison"] in token_ids:
            struck.append(limits["place"])
            if limits["place"] in ("forward", "making up"):
                raise MemoryError(f"no memory for {len(token_ids)} tokens")
        return forward(self, step, hidden)

    TorchExecutor.forward = failing_forward  # type: ignore[method-assign]
    for name, (owner, attribute, is_there) in PLACES.items():
        setattr(owner, attribute, _failing(name, getattr(owner, attribute), is_there, struck))


def _failing(
    name: str, original: Callable[..., Any], is_there: Callable[..., bool], struck: list[str]
) -> Callable[..., Any]:
    def failing(*arguments: Any) -> Any:
        if name in struck and is_there(*arguments):
            raise MemoryError(f"no memory: {name}")
        return original(*arguments)

    return failing


if __name__ == "__main__":
    be_poor(Path(sys.argv[1]))
    _end_with_parent()
    main(Connection(int(sys.argv[-1])))
