"""Int8 layers that several processes share: what the kernels exchange amid a forward pass."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from stallfree.kernels import shapes, shares
from stallfree.model.part import ModelPart
from stallfree.model.peers import Alone, Exchange, Peers

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_CPU = torch.device("cpu")


def exchanges(part: ModelPart, width: int, rows: int) -> list[Exchange]:
    """What `Int8Shares.run` of so many rows exchanges, in the order of `kernels/shares.py`."""
    of_layer = []
    for first in range(0, rows, shapes.SLICE_ROWS):
        some = min(shapes.SLICE_ROWS, rows - first)
        ranges = Exchange("largest", (some, 2), torch.float32, _CPU)
        of_layer += [ranges, Exchange("sum", (some, width), torch.int32, _CPU)] * 2
    embedded = [Exchange("sum", (rows, width), torch.float32, _CPU)]
    return embedded * part.is_first + of_layer * part.num_layers


def exchange_of_logits(rows: int, share: int) -> Exchange:
    """The exchange of so many rows of logits, of which a process has a share."""
    return Exchange("concat", (rows, share), torch.float32, _CPU)


class Int8Shares:
    """Runs the layers of a process that has a share of each.

    Args:
        tokens: which rows of the embedding it has.
    """

    def __init__(self, tokens: slice) -> None:
        self._tokens = tokens
        self._ranges = np.empty((0, 2), dtype=np.float32)
        self._sums = np.empty((0, 0), dtype=np.int32)
        self._peers: Peers = Alone()
        self._exchanged: dict[int, torch.Tensor] = {}  # a row for each, by what it is
        self._failure: BaseException | None = None
        self._callback = _Callback(self._exchange)  # kept, as its address is

    def run(
        self,
        threads: int,
        table: shapes.Product,
        layers: shapes.Layers,
        job: shapes.Job,
        peers: Peers,
    ) -> None:
        """Run all layers as `shares.run` does.

        Args:
            threads: that share the work of this process.
            table: its share of the embedding.
            layers: its share of each.
            job: the batch, its KV cache and memory.
            peers: that have the other shares, and run the same batch.

        Raises:
            LostContactError: they cannot be reached; the hidden states mean nothing.
        """
        width = job.shape.width
        rows = min(job.work.token_ids.size, shapes.SLICE_ROWS)
        if rows > len(self._sums):
            self._ranges = np.empty((rows, 2), dtype=np.float32)
            self._sums = np.empty((rows, width), dtype=np.int32)
        self._exchanged = {
            shares.EMBEDDED: torch.from_numpy(job.scratch.hidden.reshape(-1, width)),
            shares.RANGES: torch.from_numpy(self._ranges),
            shares.SUMS: torch.from_numpy(self._sums),
        }
        self._peers, self._failure = peers, None
        share = shapes.Share(
            first_token=self._tokens.start,
            num_tokens=self._tokens.stop - self._tokens.start,
            ranges=self._ranges.reshape(-1),
            sums=self._sums.reshape(-1),
            exchange=ctypes.cast(self._callback, ctypes.c_void_p).value or 0,
        )
        shares.run(threads, table, layers, job, share)
        if self._failure is not None:
            raise self._failure

    def _exchange(self, what: int, rows: int) -> None:
        """Join the first rows of something with the peers'; after a failure, leave it as it is.

        The kernels call this, and nothing can be raised through them.
        """
        if self._failure is not None:
            return
        own = self._exchanged[what][:rows]
        try:
            join = self._peers.largest if what == shares.RANGES else self._peers.sum
            own.copy_(join(own))
        except BaseException as error:
            self._failure = error
