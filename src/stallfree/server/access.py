"""Who may use the protected routes: those with a key, each within its limits.

The checks are dependencies of routes, as FastAPI has them.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from stallfree.server.errors import ApiError
from stallfree.server.guard import Places, at_end
from stallfree.server.keys import Keyring

_BEARER = HTTPBearer(auto_error=False)


def key_check(keys: Keyring | None, watches: bool = False) -> list[Any]:
    """The dependencies of routes that take a key, if there are any.

    Args:
        keys: that are good.
        watches: whether the routes only show what the server does.
    """
    return [] if keys is None else [Depends(_KeyCheck(keys, watches).check)]


def places(max_concurrent_requests: int) -> list[Any]:
    """The dependencies of routes that take one of so many places."""
    return [Depends(Places(max_concurrent_requests).take)]


def owner_of(request: Request) -> str:
    """The name of the key that `request` has; empty where keys have no names."""
    owner: str = getattr(request.state, "owner", "")
    return owner


class _KeyCheck:
    """Refuses requests without a key (401), and those beyond its limits (429)."""

    def __init__(self, keys: Keyring, watches: bool) -> None:
        self._keys = keys
        self._watches = watches

    async def check(
        self,
        request: Request,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        """Let `request` pass, and note whose it is."""
        text = b"" if given is None else given.credentials.encode("latin-1")
        key = self._keys.find(text)
        if key is None:
            raise ApiError(
                401,
                "the API key is wrong" if text else "an API key is required as a bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        at_end(request, self._keys.take(key, self._watches))
        if self._keys.has_names:
            request.state.owner = key.name
