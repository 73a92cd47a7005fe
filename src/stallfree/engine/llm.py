"""Generation without a server: prompts in, completions out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stallfree.core.admission import Admission
from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.errors import InvalidRequestError
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
    def from_settings(cls, settings: EngineSettings, *, show_progress: bool = True) -> LLM:
        """The same, from settings that exist already."""
        llm = cls.__new__(cls)
        llm._load(settings, show_progress=show_progress)
        return llm

    def _load(self, settings: EngineSettings, *, show_progress: bool = True) -> None:
        self.engine = build_engine(settings, show_progress=show_progress)
        self.engine.admission = Admission()  # all prompts of a call may wait
        self.tokenizer = self.engine.tokenizer
        self._num_requests = 0
        self._deltas: dict[str, deque[Delta]] = {}  # of open requests, until they are read

    def close(self) -> None:
        """End the processes of the model, if it has any; they also end with this one."""
        self.engine.close()

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
            use_progress_bar: show finished completions on stderr, if that is a terminal.

        Returns:
            One output for each prompt, in order.

        Raises:
            InvalidRequestError: a prompt or its parameters are wrong; none is run.
            ExecutorError: an iteration failed.
        """
        outputs = dict(self.as_completed(prompts, sampling_params, use_progress_bar))
        return [outputs[index] for index in range(len(outputs))]

    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_progress_bar: bool = True,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Like `generate`, but each output is given as soon as it is complete.

        Yields:
            The index of a prompt, and its output.
        """
        listed = _as_list(prompts)
        params = _spread(sampling_params, len(listed))
        encoded = [self._encode(prompt) for prompt in listed]
        for token_ids, own in zip(encoded, params, strict=True):
            self.engine.check(token_ids, own)
        indices = {self._open(*pair): i for i, pair in enumerate(zip(encoded, params, strict=True))}
        parts: dict[str, list[Delta]] = {request_id: [] for request_id in indices}
        try:
            with _Progress(sum(own.n for own in params), use_progress_bar) as progress:
                while parts:
                    self._step()
                    for request_id, deltas in list(parts.items()):
                        new = self._take(request_id)
                        deltas += new
                        progress.add(new)
                        index = indices[request_id]
                        if _num_ended(deltas) == params[index].n:
                            del parts[request_id], self._deltas[request_id]
                            yield (
                                index,
                                _collect(listed[index], encoded[index], params[index].n, deltas),
                            )
        finally:
            for request_id in parts:
                self._close(request_id)

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
    ) -> Generator[Delta, None, None]:
        """Complete one prompt, piece by piece; closing the generator ends it.

        Raises:
            InvalidRequestError: the prompt or its parameters are wrong.
            ExecutorError: an iteration failed.
        """
        params = sampling_params or SamplingParams()
        request_id = self._open(self._encode(prompt), params)
        num_open = params.n
        try:
            while num_open:
                self._step()
                for delta in self._take(request_id):
                    num_open -= delta.finish_reason is not None
                    yield delta
        finally:
            self._close(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _open(self, token_ids: Sequence[int], params: SamplingParams) -> str:
        self._num_requests += 1
        request_id = f"request-{self._num_requests}"
        self.engine.add(request_id, token_ids, params)
        self._deltas[request_id] = deque()
        return request_id

    def _step(self) -> None:
        for delta in self.engine.step():
            self._deltas[delta.request_id].append(delta)

    def _take(self, request_id: str) -> list[Delta]:
        """The new deltas of a request, from whichever step they came."""
        waiting = self._deltas[request_id]
        taken = [waiting.popleft() for _ in range(len(waiting))]
        for delta in taken:
            if delta.error is not None:
                raise delta.error
        return taken

    def _close(self, request_id: str) -> None:
        self.engine.abort(request_id)
        del self._deltas[request_id]


class _Progress:
    """A bar of finished completions on stderr, if that is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[num_tokens]} tokens"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._num_tokens = 0
        self._task = self._bar.add_task("", total=total, num_tokens=0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def add(self, deltas: Sequence[Delta]) -> None:
        if deltas:
            self._num_tokens += sum(len(delta.token_ids) for delta in deltas)
            self._bar.update(self._task, advance=_num_ended(deltas), num_tokens=self._num_tokens)


def _num_ended(deltas: Sequence[Delta]) -> int:
    return sum(delta.finish_reason is not None for delta in deltas)


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
