"""Fetching models from the Hugging Face hub, or from its local cache.

Only the files that stallfree can use are fetched: no pickles, no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stallfree.errors import ModelError

_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_NAME = r"[\w-][\w.-]*"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}(:({_NAME}/)*{_NAME}\.gguf)?", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Whether `model` reads like `org/name` or `org/name:FILE.gguf`."""
    return _HUB_ID.fullmatch(model) is not None


def fetch(model: str, revision: str | None) -> Path:
    """Local path of a model on the hub: a folder, or the GGUF file that `model` names.

    Files in the hub's cache are not fetched again; with HF_HUB_OFFLINE=1, or without a network,
    they are all there is.

    Args:
        model: `org/name`, or `org/name:FILE.gguf`.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        ModelError: it does not exist, may not be fetched, or is neither reachable nor cached.
    """
    from huggingface_hub import snapshot_download  # slow to import

    repository, _, file = model.partition(":")
    patterns = [file] if file else list(_FILES)
    with _explained(model, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    if file and not (folder / file).is_file():
        raise ModelError(f"{repository} has no file {file}")
    return folder / file


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub's client into one that says what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        problem = (
            "is gated: accept its conditions on https://huggingface.co and set HF_TOKEN, "
            "or run `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            "is not on the hub, and not a local folder or file; check the name, "
            "and set HF_TOKEN if it is private"
        )
    except errors.RevisionNotFoundError:
        problem = "does not exist; check the revision"
    except errors.LocalEntryNotFoundError as error:
        problem = (
            "is not a local folder or file, not in the hub's cache, and the hub cannot be reached "
            f"({_first_line(error)}); go online, without HF_HUB_OFFLINE=1, or name a local model"
        )
    except errors.HFValidationError as error:
        problem = f"is not a valid hub id: {_first_line(error)}"
    except Exception as error:  # whatever its HTTP client raises
        problem = f"cannot be fetched from the hub: {_first_line(error)}"
    else:
        return
    raise ModelError(f"{model}{at} {problem}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
