"""Reading a tokenizer from a model's files.

Models keep tokenizers in many forms; the `transformers` library knows them all, and takes seconds
to import and convert one. So the result is kept in the cache folder, and while the model's files
stay the same only that is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers

from stallfree.cache import atomic_file, cache_folder
from stallfree.engine.gguf_tokenizer import convert_gguf
from stallfree.errors import ModelError, TokenizerError

_FORMAT = 1  # of the cached file; also to be raised if a conversion changes
_MAX_ENTRIES = 32
_KINDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model's files say of its tokenizer.

    Attributes:
        backend: ready to use, without truncation and padding.
        chat_template: the default one, if there is one.
        special_tokens: texts by role, such as `eos_token`.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Read the tokenizer of a model folder or a GGUF file.

    A cache that is damaged or cannot be written costs time, no more.

    Raises:
        TokenizerError: there is none, or it cannot be used.
        ModelError: the model's files cannot be read.
    """
    is_folder = path.is_dir()
    if is_folder and not any((path / name).is_file() for name in _KINDS):
        raise TokenizerError(f"{path} has no tokenizer: none of {', '.join(_KINDS)} is there")
    entry = cache_folder() / "tokenizers" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    fingerprint = _fingerprint(path)
    files = _read_entry(entry, fingerprint)
    if files is None:
        files = _convert_folder(path) if is_folder else TokenizerFiles(*convert_gguf(path))
        _write_entry(entry, fingerprint, files)
    return files


def _fingerprint(path: Path) -> list[Any]:
    """What changes when the tokenizer's files, or the libraries that convert them, do."""
    files = path.iterdir() if path.is_dir() else [path]
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(files)
        if file.is_file() and (file == path or file.suffix not in _WEIGHT_SUFFIXES)
    ]
    versions = [metadata.version(name) for name in ("transformers", "tokenizers")]
    return [_FORMAT, versions, [list(stat) for stat in stats]]


def _read_entry(entry: Path, fingerprint: list[Any]) -> TokenizerFiles | None:
    """A cached tokenizer; None if there is none, or not of these files, or it is damaged.

    The file has a checksum, a line of JSON, and the tokenizer as the `tokenizers` library has it.
    """
    try:
        checksum, rest = entry.read_bytes().split(b"\n", 1)
        if int(checksum, 16) != zlib.crc32(rest):
            return None
        head, body = rest.split(b"\n", 1)
        about = json.loads(head)
        if about["fingerprint"] != fingerprint:
            return None
        backend = tokenizers.Tokenizer.from_buffer(body)
        return TokenizerFiles(backend, about["chat_template"], about["special_tokens"])
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can fail in any way; it is made anew
        _log.info("ignoring the cached tokenizer %s: %s", entry, error)
        return None


def _write_entry(entry: Path, fingerprint: list[Any], files: TokenizerFiles) -> None:
    about = {
        "fingerprint": fingerprint,
        "chat_template": files.chat_template,
        "special_tokens": dict(files.special_tokens),
    }
    content = json.dumps(about).encode() + b"\n" + files.backend.to_str().encode()
    try:
        with atomic_file(entry, len(content)) as file:
            file.write(b"%08x\n" % zlib.crc32(content))
            file.write(content)
        _drop_old_entries(entry.parent)
    except (ModelError, OSError) as error:
        _log.warning("the converted tokenizer is not kept, so each start takes longer: %s", error)


def _drop_old_entries(folder: Path) -> None:
    """Keep the newest entries: models come and go, and nothing says when one is gone."""
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for entry in entries[_MAX_ENTRIES:]:
        entry.unlink(missing_ok=True)


def _convert_folder(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of a folder with `transformers`. No code from the folder is run."""
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        backend = getattr(tokenizer, "backend_tokenizer", None)
    except Exception as error:  # it may be broken in any way
        raise TokenizerError(
            f"the tokenizer of {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if backend is None:
        raise TokenizerError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) cannot be used: "
            "only those that the tokenizers library runs can"
        )
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerFiles(backend, template, tokenizer.special_tokens_map)
