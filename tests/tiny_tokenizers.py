"""Tiny tokenizers in folders and GGUF files, and texts and messages for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
from tiny_models import write_gguf

from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.model.source import ModelSource
from stallfree.model.weights import SafetensorsWeights

MESSAGES = [{"role": "user", "content": "hello world"}]
TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces\n\n\ttab ",
    "naïve café, 你好 世界! 🙂👩‍👩‍👧",
    "e\u0301 combining",
    "def f(x):\n    return x * 123456\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|not_a_token|> \u0000 \x7f",
]


def save_tokenizer(folder: Path) -> Path:
    """Save a tiny byte-level tokenizer as a model folder has it, to a new `folder`."""
    tiny.train_tokenizer(400).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def save_gguf(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write a GGUF file with this tokenizer."""
    return write_gguf(folder / "tiny.gguf", extra=metadata)


def load(path: Path) -> Tokenizer:
    """The tokenizer of a model whose weights are never touched."""
    weights = SafetensorsWeights.__new__(SafetensorsWeights)
    return load_tokenizer(ModelSource("tiny", path, {}, frozenset(), weights))


def byte_level_tokenizer() -> Tokenizer:
    """A tiny byte-level tokenizer without a chat template."""
    return Tokenizer(tiny.train_tokenizer(400).backend_tokenizer)
