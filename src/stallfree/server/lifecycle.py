"""From a bound port to an exit code: start, drain on a signal, end when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.connection import MAX_LINGERING, Connection
from stallfree.server.handshakes import HandshakeLimits, Handshakes
from stallfree.server.keys import Keyring
from stallfree.server.request_id import RequestNotes
from stallfree.server.service import Service
from stallfree.server.tls import tls_context

KEEP_ALIVE_S = 75
LAST_WRITES_S = 5  # how long clients may take to read what is finished
SWITCH_INTERVAL_S = 0.0005
SEND_BUFFER_BYTES = 128 * 1024  # of an answer that the kernel holds for its client
OTHER_FILES = 256  # that this process may have open beside connections

logger = logging.getLogger("stallfree.server")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken or not allowed, or the host is not an address of this
            machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server((str(address[0]), port), family=family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return listener
    except UnicodeError as error:
        reason = f"host {host!r} is not a name or an address: {error.args[-1]}"
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                reason = f"port {port} on {host} is in use; choose another with --port"
            case errno.EACCES:
                reason = f"port {port} needs more rights than this user has; choose one above 1023"
            case _:
                reason = f"cannot listen on {host}, port {port}: {error.strerror or error}"
    raise ConfigError(reason)


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """A URL at which this machine reaches `listener`."""
    host, port = listener.getsockname()[:2]
    if listener.family == socket.AF_INET6:
        return f"{scheme}://[{'::1' if host == '::' else host}]:{port}"
    return f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def check_start(settings: ServerSettings) -> None:
    """Raise ConfigError for what would keep a server from starting, before minutes of loading."""
    bind(settings.host, settings.port).close()
    tls_context(settings)
    Keyring.of(settings)


def allow_connections(count: int) -> None:
    """Let this process have `count` connections, where the system puts a lower limit first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft < wanted and soft != resource.RLIM_INFINITY:
        possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
        if possible < wanted:
            message = "max_connections is %d, but this user may open no more than %d files"
            logger.warning(message, count, possible)


class ApiServer(uvicorn.Server):
    """Serves an app until a signal, `shut_down` or the death of the engine.

    The first signal drains: requests are refused, those that run may finish within
    `drain_timeout_s`. The second ends at once.

    Args:
        app: the application, whose lifespan starts and stops the engine.
        service: what the app serves.
        notes: of its requests.
        settings: of the server.
        on_ready: called with the URL once requests are answered.

    Attributes:
        exit_code: of the process, once `run` has returned.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        notes: RequestNotes,
        settings: ServerSettings,
        on_ready: Callable[[str], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",  # what clients send is no news
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            timeout_graceful_shutdown=LAST_WRITES_S,
        )
        super().__init__(config)
        self.exit_code = 0
        self._service = service
        self._notes = notes
        self._settings = settings
        self._handshakes = self._new_handshakes()
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        service.engine.on_death = lambda _: self._post(self._engine_died)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen; called by uvicorn.

        Tunes this process for even latency: threads that hold the interpreter let go of it sooner,
        and what is loaded by now is never searched for garbage, which stops all threads.
        """
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._service.reload)
        if self._service.keys is not None:
            self._service.keys.warn_if_open()
        allow_connections(self._settings.max_connections)
        await super().startup([])
        for each in sockets or ():
            self.servers.append(await self._listen(self._loop, each))
        if sockets:
            self._on_ready(url_of(sockets[0], "http" if self._handshakes is None else "https"))

    async def _listen(
        self, loop: asyncio.AbstractEventLoop, listener: socket.socket
    ) -> asyncio.Server:
        """Take connections, as `uvicorn` would, but of our own kind and with less patience."""
        accept: Callable[[], asyncio.Protocol] = self._connection
        if self._handshakes is not None:
            accept = self._handshakes.accept
        return await loop.create_server(accept, sock=listener, backlog=self.config.backlog)

    def _connection(self) -> Connection:
        return Connection(
            self.config,
            self.server_state,
            self.lifespan.state,
            self._settings,
            self._notes,
            () if self._handshakes is None else self._handshakes,
        )

    def _new_handshakes(self) -> Handshakes | None:
        context = tls_context(self._settings)
        if context is None:
            return None
        limits = HandshakeLimits(
            self._settings.header_timeout_s, self._settings.max_connections + MAX_LINGERING
        )
        return Handshakes(context, limits, self.server_state.connections, self._connection)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, and wait for what is under way; called by uvicorn."""
        for server in self.servers:
            server.close()
        if self._handshakes is not None:
            self._handshakes.abort()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take a signal; called by uvicorn, between any two instructions of the main thread."""
        if self._loop is None:  # nothing has started
            self.should_exit = True
        self._post(lambda: self._end(sig))

    def shut_down(self) -> None:
        """Drain and end, as at the first signal. May be called from any thread."""
        self._post(lambda: self._end(signal.SIGTERM))

    def _post(self, action: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the server
                self._loop.call_soon_threadsafe(action)

    def _end(self, sig: int) -> None:
        if self._drain is None:
            self._service.draining = True
            self._drain = asyncio.ensure_future(self._drain_engine())
            return
        logger.warning("ending at once")
        self.exit_code = 128 + sig
        self._service.ends_at_once = True
        self.should_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _drain_engine(self) -> None:
        engine = self._service.engine
        num_left = engine.num_running + engine.num_waiting
        if num_left:
            message = "shutting down: %d completions may take %g s more; Ctrl-C again ends at once"
            logger.warning(message, num_left, self._settings.drain_timeout_s)
        if not await engine.drain(self._settings.drain_timeout_s):
            logger.warning(
                "some completions were cut off after %g s", self._settings.drain_timeout_s
            )
        self.should_exit = True

    def _engine_died(self) -> None:
        self.exit_code = 1
        self.should_exit = True
