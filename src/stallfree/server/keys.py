"""API keys: read from a file, kept as hashes, each with a name and limits of its own.

Nothing here ever shows a key, not even a wrong one. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError, OverloadedError

MIN_KEY_CHARS = 8
SINGLE_KEY_NAME = "api-key"  # of the key that --api-key gives
CONCURRENCY_RETRY_S = 1.0
_MOST_WATCHING = 8  # requests at once that only watch, of a key with a limit of others
_UNIT_S = {"s": 1.0, "min": 60.0}

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")
_RATE = re.compile(r"([1-9]\d{0,8})/(s|min)")
_CONCURRENCY = re.compile(r"[1-9]\d{0,8}")

logger = logging.getLogger("stallfree.server")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and what it allows.

    Attributes:
        name: whose it is; it has no slash.
        digest: SHA-256 of the key.
        rate: requests in `rate_period_s`, or None for any number.
        rate_period_s: seconds.
        concurrency: requests under way at once, or None for any number.
    """

    name: str
    digest: bytes = field(repr=False)
    rate: int | None = None
    rate_period_s: float = 1.0
    concurrency: int | None = None


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a file of keys: `NAME:KEY`, then limits; `#` begins a comment line.

    Raises:
        ConfigError: it cannot be read, or a line is wrong; says which line, and never shows a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys_file {path} is not UTF-8 text") from None
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = _read_line(line)
            if any(key.name == other.name for other in keys):
                raise ConfigError(f"the name {key.name!r} is there twice")
            if any(key.digest == other.digest for other in keys):
                raise ConfigError(f"the key of {key.name!r} is that of another name")
        except ConfigError as error:
            raise ConfigError(f"api_keys_file {path}, line {number}: {error}") from None
        keys.append(key)
    if not keys:
        raise ConfigError(f"api_keys_file {path} holds no key")
    return tuple(keys)


def _read_line(line: str) -> ApiKey:
    head, *options = line.split()
    name, _, key = head.partition(":")
    if not key:
        raise ConfigError("it does not begin with NAME:KEY")
    if not _NAME.fullmatch(name):
        raise ConfigError("the name must be 1 to 64 letters, digits, dots, dashes and underscores")
    if not _KEY.fullmatch(key) or len(key) < MIN_KEY_CHARS:
        raise ConfigError(f"the key of {name!r} must be {MIN_KEY_CHARS} ASCII characters or more")
    limits: dict[str, str] = {}
    for option in options:
        option_name, _, value = option.partition("=")
        if option_name not in ("rate", "concurrency") or option_name in limits:
            raise ConfigError(
                f"after the key of {name!r} there may be rate=10/s or rate=60/min, and "
                "concurrency=4, each once"
            )
        limits[option_name] = value
    rate, period_s = _read_rate(limits.get("rate"))
    concurrency = limits.get("concurrency")
    if concurrency is not None and not _CONCURRENCY.fullmatch(concurrency):
        raise ConfigError(f"concurrency is {concurrency!r}; it must be a whole number from 1")
    return ApiKey(
        name,
        digest_of(key.encode()),
        rate,
        period_s,
        None if concurrency is None else int(concurrency),
    )


def _read_rate(text: str | None) -> tuple[int | None, float]:
    if text is None:
        return None, 1.0
    match = _RATE.fullmatch(text)
    if match is None:
        raise ConfigError(f"rate is {text!r}; write it as 10/s or 60/min")
    return int(match[1]), _UNIT_S[match[2]]


class _Use:
    """What a key has under way, and how many requests it may send now: a token bucket.

    It holds as many requests as the rate allows in its period, and begins full.
    """

    def __init__(self, now_s: float) -> None:
        self.num_running = 0
        self._spent = 0.0  # of the bucket
        self._updated_s = now_s

    def take(self, key: ApiKey, now_s: float) -> None:
        """Count a request; raises OverloadedError if it is one too many."""
        if key.concurrency is not None and self.num_running >= key.concurrency:
            raise OverloadedError(
                f"the key {key.name!r} has as many requests under way as it may: {key.concurrency}",
                CONCURRENCY_RETRY_S,
            )
        if key.rate is not None:
            per_s = key.rate / key.rate_period_s
            self._spent = max(0.0, self._spent - (now_s - self._updated_s) * per_s)
            self._updated_s = now_s
            if self._spent + 1 > key.rate:
                raise OverloadedError(
                    f"the key {key.name!r} may send {key.rate} requests in "
                    f"{key.rate_period_s:g} s, and has sent them",
                    (self._spent + 1 - key.rate) / per_s,
                )
            self._spent += 1
        self.num_running += 1


class Keyring:
    """The keys that are good now.

    Args:
        path: the file they are read from, if any.
        single: one more key, if any.
        clock: gives seconds.

    Attributes:
        has_names: whether keys have names that tell clients apart.

    Raises:
        ConfigError: the file is wrong.
    """

    def __init__(
        self,
        path: Path | None,
        single: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._single = () if single is None else (_single_key(single),)
        self._clock = clock
        self._uses: dict[tuple[str, bool], _Use] = {}  # by name, and whether one watches
        self._keys: tuple[ApiKey, ...] = self._single
        self.has_names = path is not None
        if path is not None:
            self._keys = self._with_single(read_keys(path))

    @classmethod
    def of(cls, settings: ServerSettings) -> Keyring | None:
        """The keys of a server; None if it needs none."""
        if settings.api_key is None and settings.api_keys_file is None:
            return None
        return cls(settings.api_keys_file, settings.api_key)

    def find(self, key: bytes) -> ApiKey | None:
        """The key that `key` is; takes as long whether it is one or not, and whichever it is."""
        digest = digest_of(key)
        found = None
        for each in self._keys:
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found

    def take(self, key: ApiKey, watches: bool = False) -> Callable[[], None]:
        """Count a request of `key`, and return what is to be called when it ends.

        One that only watches what the server does takes nothing from the others: it is counted
        apart, by the same rate, and may go on beside as many of them as there are; if the key has a
        limit of them, so do those that watch.

        Raises:
            OverloadedError: it is over a limit of the key; says when to try again.
        """
        now_s = self._clock()
        use = self._uses.setdefault((key.name, watches), _Use(now_s))
        if watches and key.concurrency is not None:
            key = replace(key, concurrency=_MOST_WATCHING)
        use.take(key, now_s)

        def end() -> None:
            use.num_running -= 1

        return end

    def reload(self) -> None:
        """Read the file again; one that is wrong is logged, and changes nothing.

        What keys of the same name have sent and have under way still counts.
        """
        if self._path is None:
            return
        try:
            keys = self._with_single(read_keys(self._path))
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        self._keys = keys
        names = {key.name for key in keys}
        self._uses = {who: use for who, use in self._uses.items() if who[0] in names}
        self.warn_if_open()
        logger.warning("took %d API keys from %s", len(keys) - len(self._single), self._path)

    def warn_if_open(self) -> None:
        """Log a warning if other users of this machine can read the file, or change it."""
        if self._path is not None and self._path.stat().st_mode & 0o077:
            message = "others can read or change %s, which holds API keys: chmod 600 it"
            logger.warning(message, self._path)

    def _with_single(self, keys: Iterable[ApiKey]) -> tuple[ApiKey, ...]:
        keys = tuple(keys)
        for single in self._single:
            if any(key.name == single.name or key.digest == single.digest for key in keys):
                raise ConfigError(
                    f"api_keys_file {self._path} has the name {single.name!r}, or the key, that "
                    "api_key has"
                )
        return (*self._single, *keys)


def _single_key(key: str) -> ApiKey:
    return ApiKey(SINGLE_KEY_NAME, digest_of(key.encode()))
