"""Finding a model by what the user calls it: nothing, a folder, a GGUF file or a hub id.

Knows which files a model consists of, not what its configuration means.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stallfree.errors import ConfigError, ModelError, UnsupportedModelError
from stallfree.model import demo, hub
from stallfree.model.weights import SafetensorsWeights, WeightSource, read_json


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and can be read.

    Attributes:
        name: what the server calls it.
        path: its folder, or its GGUF file.
        hf_config: its `config.json`, or the like of one made from the metadata of a GGUF file.
        end_token_ids: the tokens that end an answer.
        weights: its tensors.
    """

    name: str
    path: Path
    hf_config: Mapping[str, Any]
    end_token_ids: frozenset[int]
    weights: WeightSource


def open_model(model: str | None, revision: str | None = None) -> ModelSource:
    """Find a model, fetching it if need be, and open its files. No tensor is read.

    Args:
        model: a folder, a GGUF file, a hub id `org/name` or `org/name:FILE.gguf`, or the name of
            an embedded model; None for the default one.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigError: there is nothing of that name, or a revision of something local is asked for.
        ModelError: it is incomplete, corrupt, not supported, or cannot be fetched.
    """
    if model is None:
        return _open_embedded(demo.DEMO, revision)
    if model in demo.EMBEDDED and not os.path.exists(model):
        return _open_embedded(demo.EMBEDDED[model], revision)
    path = Path(os.path.expanduser(model))  # unlike Path's, it never raises
    if model and os.path.exists(path):
        _refuse_revision(revision, f"{model}, which is local,")
        return _open_folder(path, path.resolve().name) if path.is_dir() else _open_gguf(path)
    if not hub.is_hub_id(model):
        raise ConfigError(
            f"model {model!r} is neither a local folder or file nor a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct"
        )
    path = hub.fetch(model, revision)
    return _open_gguf(path) if ":" in model else _open_folder(path, model)


def _refuse_revision(revision: str | None, of: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision {revision!r} of {of} means nothing; only hub ids have some")


def _open_embedded(model: demo.EmbeddedModel, revision: str | None) -> ModelSource:
    _refuse_revision(revision, f"the embedded model {model.name}")
    return _open_gguf(demo.assemble(model), model.name)


def _open_gguf(path: Path, name: str | None = None) -> ModelSource:
    from stallfree.model.gguf import GgufWeights  # slow to import

    weights = GgufWeights(path)
    return ModelSource(name or path.stem, path, weights.hf_config, weights.end_token_ids, weights)


def _open_folder(folder: Path, name: str) -> ModelSource:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ModelError(f"{folder} cannot be read: {os.strerror(errno.EACCES)}")
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; did you mean {folder / ggufs[0]}?" if ggufs else ""
        raise ModelError(f"{folder} is not a model: it has no config.json{hint}")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{folder} is quantized ({method or 'unknown method'}); of the quantized formats "
            "only GGUF is supported"
        )
    return ModelSource(
        name, folder, config, _end_token_ids(folder, config), SafetensorsWeights(folder)
    )


def _end_token_ids(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The union of what the generation configuration, the configuration and the tokenizer say."""
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    ids: set[int] = set()
    for where, value in (
        ("generation_config.json", generation.get("eos_token_id")),
        ("config.json", config.get("eos_token_id")),
    ):
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in found):
            raise ModelError(f"eos_token_id in {folder / where} is {value!r:.80}, not token ids")
        ids.update(found)
    of_tokenizer = _tokenizer_eos(folder)
    return frozenset(ids if of_tokenizer is None else ids | {of_tokenizer})


def _tokenizer_eos(folder: Path) -> int | None:
    """The id of the tokenizer's `eos_token`, if it names one and its files tell the id."""
    config_path, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_path.is_file():
        return None
    config = read_json(config_path)
    eos = config.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return None
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token_id, token in decoder.items():
            if isinstance(token, dict) and token.get("content") == text and token_id.isdecimal():
                return int(token_id)
    added = read_json(path).get("added_tokens") if path.is_file() else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == text:
            token_id = token.get("id")
            return token_id if type(token_id) is int else None
    return None
