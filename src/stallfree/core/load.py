"""Admitted requests by what they do, sorted once in an iteration for all who ask."""

from __future__ import annotations

from collections.abc import Iterable

from stallfree.core.request import Request


class Load:
    """Requests that run.

    Attributes:
        decodes: those that continue an answer, without those of tier `flex`.
        flex_decodes: those of tier `flex`.
        prefills: those that read a prompt, of all tiers.
        context: tokens of the decodes together.
        flex_context: the same of `flex_decodes`.
        tbt_s: the tightest target that one of the decodes has of its own, in seconds, or None.
    """

    __slots__ = ("context", "decodes", "flex_context", "flex_decodes", "prefills", "tbt_s")

    def __init__(self, requests: Iterable[Request]) -> None:
        self.decodes: list[Request] = []
        self.flex_decodes: list[Request] = []
        self.prefills: list[Request] = []
        self.context = self.flex_context = 0
        self.tbt_s: float | None = None
        for request in requests:
            if not request.is_decode:
                self.prefills.append(request)
            elif request.is_flex:
                self.flex_decodes.append(request)
                self.flex_context += request.num_tokens
            else:
                self.decodes.append(request)
                self.context += request.num_tokens
                tbt_s = request.targets.tbt_s
                if tbt_s is not None and (self.tbt_s is None or tbt_s < self.tbt_s):
                    self.tbt_s = tbt_s
