"""Chat templates in a process of their own, which is ended if one takes too long.

Jinja's sandbox keeps a template from files and objects that are not its own, but not from looping,
nor from building something huge within a single call of C, which no thread can interrupt. Here the
system bounds its time and its memory, and the server goes on.

Run as a program this is that process: a line of JSON in, a line of JSON out, until there is none.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from stallfree.engine.chat_template import render_template
from stallfree.errors import EngineStoppedError, InvalidRequestError

TIMEOUT_S = 5.0
MEMORY_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_ENVIRONMENT = (  # all that it inherits: the rest may hold secrets
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "TZ",
    "LANG",
    "LC_ALL",
)


class TemplateProcess:
    """Runs chat templates, one at a time. It starts with the first, unless it has been started.

    Args:
        timeout_s: seconds that a template may take.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> None:
        """Start the process, which takes it about 0.2 s; this does not wait for that."""
        with self._lock:
            self._running()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Run a template on variables that JSON can hold, in whichever thread.

        Raises:
            InvalidRequestError: as of `render_template`; or it takes too long or too much memory.
            EngineStoppedError: this has been closed.
        """
        question = {
            "template": template,
            "variables": dict(variables),
            "cpu_s": int(self._timeout_s) + 1,
        }
        with self._lock:
            process = self._running()
            try:
                answer = _ask(process, question, time.monotonic() + self._timeout_s)
            except TimeoutError:
                self._end()
                raise InvalidRequestError(
                    f"the chat template took over {self._timeout_s:g} s on these messages",
                    "messages",
                ) from None
            except (EOFError, BrokenPipeError):
                self._end()
                raise InvalidRequestError(
                    "the chat template took too much time or memory on these messages", "messages"
                ) from None
        if "error" in answer:
            raise InvalidRequestError(answer["error"], "messages")
        return str(answer["text"])

    def close(self) -> None:
        """End the process for good; whoever waits for it gets an error."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # which ends the wait of whoever holds the lock
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise EngineStoppedError("the server is about to end")
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is the server's to take
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes its pipes and waits for it
                pass


def _ask(
    process: subprocess.Popen[bytes], question: Mapping[str, Any], deadline_s: float
) -> dict[str, Any]:
    """The answer to a question; raises TimeoutError, EOFError or BrokenPipeError without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(_line(question))
    process.stdin.flush()
    answer = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), _CHUNK_BYTES)
            if not piece:
                raise EOFError
            answer += piece
    found: dict[str, Any] = _parsed(answer)
    return found


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _parsed(line: bytes | bytearray) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _limit_cpu(seconds: int) -> None:
    """Have the system end this process when it has computed for `seconds` more.

    Then it ends even if the server has ended before it.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        question = _parsed(line)
        _limit_cpu(question["cpu_s"])
        try:
            answer = {"text": render_template(question["template"], question["variables"])}
        except InvalidRequestError as error:
            answer = {"error": str(error)}
        sys.stdout.buffer.write(_line(answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
