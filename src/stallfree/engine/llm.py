"""Generation without a server: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ExecutorError, InvalidRequestError
from stallfree.executor.output import PositionLogprobs

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion; see `Delta` for the fields."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The completions of one prompt; `prompt` is None if it was given as token ids."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None


class LLM:
    """A model in this process.

    Args:
        model: folder, GGUF file or hub id; None is the demo model.
        settings: any field of `EngineSettings`.

    Example:
        >>> llm = LLM("Qwen/Qwen2.5-0.5B-Instruct", token_budget=64)
        >>> llm.generate("Once upon a time", SamplingParams(max_tokens=8))[0].outputs[0].text
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self._load(EngineSettings(model=model, **settings))

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> LLM:
        """The same, from settings that exist already."""
        llm = cls.__new__(cls)
        llm._load(settings)
        return llm

    def _load(self, settings: EngineSettings) -> None:
        self.engine = build_engine(settings)
        self.tokenizer = self.engine.tokenizer
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress_bar: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them batched together.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one for each.
            use_progress_bar: show finished completions on stderr.

        Returns:
            One output for each prompt, in order.

        Raises:
            InvalidRequestError: a prompt or its parameters are wrong; none is run.
            ExecutorError: an iteration failed.
        """
        listed = _as_list(prompts)
        params = _spread(sampling_params, len(listed))
        encoded = [self._encode(prompt) for prompt in listed]
        for token_ids, own in zip(encoded, params, strict=True):
            self.engine.check(token_ids, own)
        parts: dict[str, list[Delta]] = {}
        for token_ids, own in zip(encoded, params, strict=True):
            parts[self._add(token_ids, own)] = []
        total = sum(own.n for own in params)
        try:
            self._run(parts, total, use_progress_bar)
        finally:
            for request_id in parts:
                self.engine.abort(request_id)
        return [
            _collect(prompt, token_ids, own.n, deltas)
            for prompt, token_ids, own, deltas in zip(
                listed, encoded, params, parts.values(), strict=True
            )
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        use_progress_bar: bool = True,
    ) -> RequestOutput:
        """Answer a conversation of `{"role": ..., "content": ...}` by the model's chat template.

        Raises:
            InvalidRequestError: the template refuses the messages, or as `generate`.
        """
        return self.generate(self.chat_prompt(messages), sampling_params, use_progress_bar)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation."""
        text = self.tokenizer.render_chat(messages)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Complete one prompt, piece by piece; closing the iterator ends it.

        Raises:
            InvalidRequestError: the prompt or its parameters are wrong.
            ExecutorError: an iteration failed.
        """
        params = sampling_params or SamplingParams()
        request_id = self._add(self._encode(prompt), params)
        num_open = params.n
        try:
            while num_open:
                for delta in self.engine.step():
                    _raise_on_error(delta)
                    if delta.request_id == request_id:
                        num_open -= delta.finish_reason is not None
                        yield delta
        finally:
            self.engine.abort(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _add(self, token_ids: Sequence[int], params: SamplingParams) -> str:
        self._num_requests += 1
        request_id = f"request-{self._num_requests}"
        self.engine.add(request_id, token_ids, params)
        return request_id

    def _run(self, parts: dict[str, list[Delta]], total: int, use_progress_bar: bool) -> None:
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[num_tokens]} tokens"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not use_progress_bar) as bar:
            task = bar.add_task("", total=total, num_tokens=0)
            num_done = num_tokens = 0
            while self.engine.has_requests:
                for delta in self.engine.step():
                    _raise_on_error(delta)
                    parts[delta.request_id].append(delta)
                    num_tokens += len(delta.token_ids)
                    num_done += delta.finish_reason is not None
                bar.update(task, completed=num_done, num_tokens=num_tokens)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _spread(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} sampling_params for {count} prompts")
    return list(params)


def _raise_on_error(delta: Delta) -> None:
    if delta.error is not None:
        raise ExecutorError(delta.error)


def _collect(
    prompt: Prompt, token_ids: Sequence[int], num_completions: int, deltas: Sequence[Delta]
) -> RequestOutput:
    outputs = []
    for index in range(num_completions):
        own = [delta for delta in deltas if delta.index == index]
        last = own[-1]
        logprobs = tuple(position for delta in own for position in delta.logprobs or ())
        outputs.append(
            CompletionOutput(
                index=index,
                text="".join(delta.text for delta in own),
                token_ids=tuple(token for delta in own for token in delta.token_ids),
                finish_reason=str(last.finish_reason),
                stop_reason=last.stop_reason,
                logprobs=logprobs if last.logprobs is not None else None,
            )
        )
    scored = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=tuple(token_ids),
        outputs=tuple(outputs),
        prompt_logprobs=scored[0] if scored else None,
    )
