"""`stallfree generate`: answer prompts in this process and write one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from stallfree.cli.prompts import PromptLine, from_file, from_stream, from_texts
from stallfree.cli.sampling import SamplingSettings
from stallfree.core.sampling_params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from stallfree.engine.llm import LLM, CompletionOutput, RequestOutput
    from stallfree.executor.output import PositionLogprobs

DEFAULT_MAX_TOKENS = 256
_PANEL = "Prompts and answers"


def generate(
    engine: EngineSettings,
    sampling: SamplingSettings,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts; without any, standard input is read."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE.jsonl",
            help="Prompts: objects with `prompt` (text or token ids) or `messages`, and optionally "
            "`id` and sampling fields such as `max_tokens`, which win over the flags.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE.jsonl",
            help="Where the answers go, in the order of the prompts, as they come.",
            show_default="standard output",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            help=f"Answers to each prompt, at most {MAX_CHOICES}.",
            metavar="ANSWERS",
            rich_help_panel="Sampling",
        ),
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help=f"Report the log probability of each token and of this many likeliest, at most "
            f"{MAX_LOGPROBS}.",
            metavar="TOKENS",
            rich_help_panel="Sampling",
        ),
    ] = None,
    progress: Annotated[
        bool,
        typer.Option(help="Show a progress bar on standard error.", rich_help_panel=_PANEL),
    ] = True,
) -> None:
    """Answer prompts offline: one JSON object a line on standard output.

    Prompts come from the arguments after MODEL, from --input, or from standard input: one a line,
    or JSONL if its first line is an object.
    """
    fields: dict[str, Any] = {"max_tokens": None, "n": n, "logprobs": logprobs}
    lines = _read_prompts(prompts or [], input_file, fields | sampling.given())
    if output_file and not output_file.parent.is_dir():
        raise ConfigError(f"output is {output_file}; there is no folder {output_file.parent}")

    from stallfree.engine.llm import LLM

    llm = LLM.from_settings(engine, show_progress=progress)
    prompt_ids = [_token_ids(llm, line) for line in lines]
    params = [_params(llm, line, ids) for line, ids in zip(lines, prompt_ids, strict=True)]
    with (
        _opened(output_file) as file,
        closing(llm.as_completed(prompt_ids, params, use_progress_bar=progress)) as outputs,
    ):
        for index, output in _in_order(outputs):
            answer = _answer(llm, lines[index], output)
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()


def _read_prompts(
    prompts: Sequence[str], input_file: Path | None, fields: dict[str, Any]
) -> list[PromptLine]:
    if prompts and input_file:
        raise ConfigError("prompts are given both as arguments and by --input; use one of them")
    if prompts:
        return from_texts(prompts, fields)
    if input_file:
        lines = from_file(input_file, fields)
    else:
        if sys.stdin.isatty():
            print("Prompts, one a line; Ctrl-D ends them.", file=sys.stderr)
        lines = from_stream(sys.stdin.read(), fields)
    if not lines:
        raise ConfigError(f"{input_file or 'standard input'} holds no prompt")
    return lines


def _token_ids(llm: LLM, line: PromptLine) -> list[int]:
    if line.messages is not None:
        return llm.chat_prompt(line.messages)
    if isinstance(line.prompt, str):
        return llm.tokenizer.encode(line.prompt)
    return list(line.prompt or ())


def _params(llm: LLM, line: PromptLine, prompt_ids: Sequence[int]) -> SamplingParams:
    """The line's parameters, with a length if it has none, checked against the model."""
    params = line.params
    if params.max_tokens is None:
        room = max(1, llm.engine.max_model_len - len(prompt_ids))
        params = replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
    try:
        llm.engine.check(prompt_ids, params)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"prompt {line.id}: {error}", error.param) from error
    return params


def _answer(llm: LLM, line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    asked = {"prompt": line.prompt} if line.messages is None else {"messages": line.messages}
    answer: dict[str, Any] = {
        "id": line.id,
        **asked,
        "outputs": [_choice(llm, completion) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": sum(len(each.token_ids) for each in output.outputs),
        },
    }
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [_position(llm, each) for each in output.prompt_logprobs]
    return answer


def _choice(llm: LLM, completion: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        choice["logprobs"] = [_position(llm, position) for position in completion.logprobs]
    return choice


def _position(llm: LLM, position: PositionLogprobs | None) -> dict[str, Any] | None:
    if position is None:
        return None

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        text = llm.tokenizer.token_text(token_id)
        return {"token": text, "token_id": token_id, "logprob": logprob}

    top = [token(token_id, logprob) for token_id, logprob in position.top]
    return {**token(position.token_id, position.logprob), "top": top}


def _in_order(
    outputs: Iterable[tuple[int, RequestOutput]],
) -> Iterator[tuple[int, RequestOutput]]:
    """The same outputs by index, each as soon as all before it are complete."""
    early: dict[int, RequestOutput] = {}
    due = 0
    for index, output in outputs:
        early[index] = output
        while due in early:
            yield due, early.pop(due)
            due += 1


@contextmanager
def _opened(output_file: Path | None) -> Iterator[TextIO]:
    if output_file is None:
        yield sys.stdout
        return
    try:
        with output_file.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{output_file} cannot be written: {error.strerror}") from error
