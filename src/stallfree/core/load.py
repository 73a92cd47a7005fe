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
        tbt_s: the tightest target that one of the decodes has of its own, in seconds, or None.
        all_have_targets: whether each of them has one.
        copy_s: most seconds that are spent on copying KV before anything runs.
    """

    __slots__ = (
        *("all_have_targets", "context", "decodes", "flex_decodes"),
        *("copy_s", "prefills", "tbt_s"),
    )

    def __init__(self, requests: Iterable[Request]) -> None:
        self.decodes: list[Request] = []
        self.flex_decodes: list[Request] = []
        self.prefills: list[Request] = []
        self.context = 0
        self.tbt_s: float | None = None
        self.all_have_targets = True
        self.copy_s = 0.0
        for request in requests:
            outputs = len(request.output_token_ids)
            num_tokens = request.num_prompt_tokens + outputs
            if not outputs or num_tokens - request.num_computed_tokens > 1:  # it is no decode
                self.prefills.append(request)
            elif request.is_flex:
                self.flex_decodes.append(request)
            else:
                self.decodes.append(request)
                self.context += num_tokens
                tbt_s = request.targets.tbt_s
                if tbt_s is None:
                    self.all_have_targets = False
                elif self.tbt_s is None or tbt_s < self.tbt_s:
                    self.tbt_s = tbt_s
