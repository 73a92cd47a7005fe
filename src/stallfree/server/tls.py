"""Serving over TLS: the certificate and its key, checked before anything else is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What connections are encrypted with; None if they are not.

    Raises:
        ConfigError: the certificate or the key cannot be used; says which, and why.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    is_encrypted = False

    def no_passphrase() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        _check_pem("tls_cert", settings.tls_cert, b"CERTIFICATE-----")
        _check_pem("tls_key", settings.tls_key, b"PRIVATE KEY-----")
        context.load_cert_chain(settings.tls_cert, settings.tls_key, no_passphrase)
    except (OSError, ValueError) as error:  # ssl's errors are of the first kind
        if is_encrypted:
            reason = "the key is encrypted; write it without a passphrase"
        elif isinstance(error, ssl.SSLError):
            reason = error.reason or str(error)
            if error.reason == "KEY_VALUES_MISMATCH":
                reason = "the key is not that of the certificate"
        else:
            reason = str(error)
        raise ConfigError(
            f"tls_cert {settings.tls_cert} with tls_key {settings.tls_key} cannot be used: {reason}"
        ) from None
    return context


def _check_pem(name: str, path: Path, mark: bytes) -> None:
    """Raise ValueError if a file is not in PEM; OpenSSL's errors do not say which file it is."""
    if mark not in path.read_bytes():
        raise ValueError(f"{name} holds no {mark.decode().rstrip('-').lower()} in PEM")
