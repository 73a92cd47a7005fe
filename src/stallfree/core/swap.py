"""KV of preempted requests outside the KV cache: which slot of the swap space holds what.

A slot holds one block, and lies in host memory or in a file. Blocks of a preempted request stay
findable in the KV cache until they are allocated anew. Only then, and only while the request waits,
a block is copied out. So nothing is copied that nobody overwrites, and a request that comes back
soon costs nothing. Blocks are taken from the end of a request on, so what is left of it is always
a beginning in the cache that goes on in the swap space. When it is admitted, blocks are allocated
for what is in the swap space, and that is copied in.

What a slot holds is known by the key of its block (see `prefix_cache`), so requests that begin
alike share slots, and nobody finds what he would not find in the cache. A slot is free again when
no preempted request waits for what it holds. A request is kept only as far as there are slots for
all that is kept, so none is ever taken away. Whatever is not there is computed again.

Copies travel with a batch, and batches run in their order: a slot can be given to another block
while a batch that reads it is in flight. What is copied out is found once its batch came back, as a
batch that failed may not have copied anything.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stallfree.core.batch import NO_COPIES, Copies, CopyIn, CopyOut
from stallfree.core.blocks import IntegrityError
from stallfree.core.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """What decides whether a preempted request is kept, and how much an iteration copies.

    Attributes:
        recompute_s: seconds to compute so many tokens of the beginning of a request again.
        out_s, in_s: seconds to copy a block out, and in.
        most_s: most seconds of copying in one iteration; None: it does not matter.
    """

    recompute_s: Callable[[int], float]
    out_s: float
    in_s: float
    most_s: float | None = None

    @property
    def slower_s(self) -> float:
        """Seconds to copy a block, in whichever direction takes longer."""
        return max(self.out_s, self.in_s)


class SwapSpace:
    """The slots, and what preempted requests wait for.

    Args:
        num_slots: how many blocks it holds.
        block_size: tokens of a block.
        costs: see `SwapCosts`.

    Attributes:
        num_out, num_in: blocks that were copied so far.
    """

    def __init__(self, num_slots: int, block_size: int, costs: SwapCosts) -> None:
        if num_slots < 1:
            raise ValueError(f"a swap space of {num_slots} slots; it must have at least 1")
        self.num_slots = num_slots
        self.num_out = self.num_in = 0
        self._block_size = block_size
        self._costs = costs
        self._most_copies = sys.maxsize  # in one iteration
        self._is_stopped = False
        if costs.most_s is not None and costs.slower_s > 0:
            self._most_copies = int(costs.most_s / costs.slower_s)
        self.forget()

    @property
    def num_used(self) -> int:
        """Slots that hold something."""
        return len(self._slots) + len(self._pending)

    def keep(self, request: Request, keys: Sequence[bytes]) -> bool:
        """Keep as much of a request that is being preempted as there are slots for.

        Unless computing that again, as one chunk, which is the least that it takes, is predicted to
        be faster than copying all of it out and in. It may turn out cheaper: what is still in the
        cache when the request comes back is not copied.

        Args:
            request: that holds no blocks from now on.
            keys: of its blocks that were computed.

        Returns:
            Whether any of it is kept.
        """
        num_new, spare, kept = 0, self.num_slots - len(self._wanted), []
        for key in keys[: self._most_copies]:
            num_new += key not in self._wanted
            if num_new > spare:
                break
            kept.append(key)
        copy_s = len(kept) * (self._costs.out_s + self._costs.in_s)
        if self._is_stopped or not kept:
            return False
        if self._costs.recompute_s(len(kept) * self._block_size) <= copy_s:
            return False
        self._kept[request.request_id] = kept
        self._wanted.update(kept)
        return True

    def leave(self, request: Request) -> None:
        """A request waits no longer: its slots are free once the next batch has its copies."""
        for key in self._kept.pop(request.request_id, ()):
            self._wanted[key] -= 1
            if self._wanted[key]:
                continue
            del self._wanted[key]
            if key in self._slots:
                self._left.append(self._slots.pop(key))
            elif key in self._pending:
                self._left.append(self._pending.pop(key).slot)

    def note_forgotten(self, block: int, key: bytes) -> None:
        """A block of the KV cache is about to hold something else than what has this key."""
        if key in self._wanted and key not in self._slots and key not in self._pending:
            self._going[key] = block

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Slots of the first of `keys`, as far as they are there and one iteration can copy."""
        slots: list[int] = []
        for key in keys:
            slot = self._slots.get(key)
            if slot is None or len(slots) == self._most_copies:
                break
            slots.append(slot)
        return slots

    def most_s(self, *, may_admit: bool) -> float:
        """Most seconds that copies take before the next batch, if one request at most comes back.

        What is waited for is in the cache, from where it may go out, or in a slot.
        """
        count = len(self._going) + len(self._wanted) * may_admit
        seconds = count * self._costs.slower_s
        return seconds if self._costs.most_s is None else min(seconds, self._costs.most_s)

    def next_copies(self, ins: Sequence[CopyIn]) -> Copies:
        """What the next batch copies: `ins`, and what would be overwritten by it.

        What went last goes out first, as it is nearest to the beginning of its request.
        """
        room = self._most_copies - len(ins)
        outs: list[CopyOut] = []
        for key, block in reversed(self._going.items()):
            if len(outs) >= room or not self._free:
                break
            if key in self._wanted:
                self._pending[key] = CopyOut(block, self._free.pop(), key)
                outs.append(self._pending[key])
        self._going.clear()
        self._free += self._left
        self._left.clear()
        if not outs and not ins:
            return NO_COPIES
        seconds = len(outs) * self._costs.out_s + len(ins) * self._costs.in_s
        return Copies(tuple(outs), ins=tuple(ins), seconds=seconds)

    def note_done(self, copies: Copies) -> None:
        """A batch came back."""
        for out in copies.outs:
            if self._pending.get(out.key) is out:
                self._slots[out.key] = self._pending.pop(out.key).slot
        self.num_out += len(copies.outs)
        self.num_in += len(copies.ins)

    def note_failed(self, copies: Copies) -> None:
        """A batch failed, perhaps before it copied anything."""
        for out in copies.outs:
            if self._pending.get(out.key) is out:
                self._free.append(self._pending.pop(out.key).slot)

    def forget(self) -> None:
        """Empty all slots: what they held is lost, and so are the batches in flight."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._left: list[int] = []  # free once the copies that may read them have been given out
        self._slots: dict[bytes, int] = {}  # by key
        self._pending: dict[bytes, CopyOut] = {}  # by key; their batches are in flight
        self._going: dict[bytes, int] = {}  # blocks by key, about to be overwritten
        self._kept: dict[str, list[bytes]] = {}  # keys by request
        self._wanted: Counter[bytes] = Counter()  # how many requests wait for a key

    def stop(self) -> None:
        """Keep nothing any more, as it cannot be copied; no batch is in flight."""
        self.forget()
        self._is_stopped = True

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that slots and all live requests agree.

        Raises:
            IntegrityError: a slot is lost or used twice, or something is kept for nobody.
        """
        waiting = {each.request_id: each for each in requests if each.state is RequestState.WAITING}
        wanted: Counter[bytes] = Counter()
        for request_id, keys in self._kept.items():
            if request_id not in waiting or waiting[request_id].block_keys[: len(keys)] != keys:
                raise IntegrityError(f"something is kept for {request_id!r} that it does not wait")
            wanted.update(keys)
        if wanted != self._wanted or len(wanted) > self.num_slots:
            raise IntegrityError("what is kept and what is waited for disagree")
        if self._slots.keys() & self._pending.keys() or not (
            wanted.keys() >= self._slots.keys() | self._pending.keys()
        ):
            raise IntegrityError("a slot holds what nobody waits for, or what another one holds")
        written = [*self._slots.values(), *(out.slot for out in self._pending.values())]
        if sorted([*self._free, *self._left, *written]) != list(range(self.num_slots)):
            raise IntegrityError("a slot of the swap space is lost, or used twice")
