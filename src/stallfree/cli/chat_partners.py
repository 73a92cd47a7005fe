"""Who answers in `stallfree chat`: a server over OpenAI's protocol, or an engine here."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.settings import API_KEY_VARIABLE
from stallfree.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from stallfree.engine.llm import LLM

Message = Mapping[str, str]
READ_TIMEOUT_S = 600.0


class ChatPartner(Protocol):
    """Answers a conversation."""

    name: str

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        """Give the answer piece by piece; Ctrl-C raises KeyboardInterrupt and stops it.

        Raises:
            InvalidRequestError: the conversation is refused, for its length for example.
            EngineError: the answer cannot be finished.
        """
        ...


class LocalPartner:
    """An engine in this process."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.name = llm.engine.model_name
        self._llm = llm
        self._params = params

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        """See `ChatPartner`."""
        prompt = self._llm.chat_prompt(messages)
        with _interrupts_noted() as interrupted:
            for delta in self._llm.stream(prompt, self._params):
                if interrupted.is_set():
                    raise KeyboardInterrupt
                if delta.error is not None:
                    raise delta.error
                yield delta.text


class RemotePartner:
    """A server that speaks OpenAI's protocol.

    Args:
        url: where it is, with or without `http://` and `/v1`.
        model: which of its models; None takes the first.
        api_key: sent as a bearer token.
        sampling: fields added to each request.

    Raises:
        EngineError: no server answers there.
        InvalidRequestError: it refuses to say which models it has.
    """

    def __init__(
        self, url: str, model: str | None, api_key: str | None, sampling: Mapping[str, Any]
    ) -> None:
        root = url if "://" in url else f"http://{url}"
        self._base = root.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._sampling = sampling
        self.name = model or self._first_model()

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        """See `ChatPartner`."""
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            **self._sampling,
        }
        try:
            with self._ask("/chat/completions", body) as response:
                for line in response:
                    if line.startswith(b"data:") and b"[DONE]" not in line:
                        yield _event_text(json.loads(line[len(b"data:") :]))
        except (OSError, ValueError) as error:
            raise EngineError(f"{self._base} broke off the answer: {error}") from error

    def _first_model(self) -> str:
        with self._ask("/models", None) as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise EngineError(f"{self._base}/models lists no model") from error

    def _ask(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self._base + path, data=data, headers=self._headers)
            response: HTTPResponse = urlopen(request, timeout=READ_TIMEOUT_S)
        except HTTPError as error:
            with error:
                raise InvalidRequestError(_error_text(error)) from error
        except (URLError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(f"no server answers at {self._base}: {reason}") from error
        return response


def _event_text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise EngineError(str(event["error"].get("message", event["error"])))
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _error_text(error: HTTPError) -> str:
    try:
        hint = f": give --api-key, or set {API_KEY_VARIABLE}" if error.code == 401 else ""
        return f"{json.load(error)['error']['message']} (HTTP {error.code}){hint}"
    except (ValueError, LookupError, TypeError):
        return f"the server answered HTTP {error.code} {error.reason}"


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that it never breaks into an iteration; a second one does."""
    noted = threading.Event()

    def note(_signal_number: int, _frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
