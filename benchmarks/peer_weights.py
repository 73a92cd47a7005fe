"""The weights of the demo model in the forms that other servers read."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

from stallfree.engine.tokenizer_files import read_tokenizer
from stallfree.model.gguf import dequantize
from stallfree.model.gguf_parser import read_header
from stallfree.model.int8 import quantize_rows
from stallfree.model.source import ModelSource, open_model

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {  # compressed-tensors: int8 weights per channel, activations per token as they come
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel"},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the forms are.

    Attributes:
        q4, q8: GGUF files: the original (Q4_K_M), and one with all matrices as Q8_0.
        bfloat16, w8a8: folders of safetensors; in the latter, layers are int8.
    """

    q4: Path
    q8: Path
    bfloat16: Path
    w8a8: Path


def write_weights(folder: Path, fresh: bool) -> Weights:
    """Write the forms of the demo model into `folder`; unless `fresh`, what is there is kept.

    Raises:
        ModelError: the demo model is not installed.
    """
    source = open_model(None)

    def once(suffix: str, write: Callable[[Path], None]) -> Path:
        path = folder / f"{source.name}-{suffix}"
        if fresh or not path.exists():
            print(f"writing {path}", file=sys.stderr)
            part = path.with_name(f"part-{path.name}")  # until it is whole
            folder.mkdir(parents=True, exist_ok=True)
            for old in (part, path):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            write(part)
            part.rename(path)
        return path

    return Weights(
        q4=source.path,
        q8=once("q8_0.gguf", lambda path: write_q8(source.path, path)),
        bfloat16=once("bfloat16", lambda path: write_folder(source, path)),
        w8a8=once("w8a8", lambda path: write_folder(source, path, W8A8)),
    )


def write_q8(source: Path, path: Path) -> None:
    """Copy a GGUF file, its matrices quantized anew as Q8_0."""
    header = read_header(source)
    fields = gguf.GGUFReader(source).fields
    writer = gguf.GGUFWriter(path, fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name not in writer.kv_data[0]:
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, info in header.tensors.items():
        values = dequantize(header.data(info), info.kind).reshape(info.shape)
        if values.ndim > 1:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(
    source: ModelSource, folder: Path, quantization: Mapping[str, Any] | None = None
) -> None:
    """Write a Hugging Face folder in bfloat16; with `quantization`, its layers in int8."""
    folder.mkdir()
    tensors = {}
    for name in sorted(source.weights.names()):
        tensor = source.weights.tensor(name)
        if quantization and name.endswith("_proj.weight"):
            tensors[name], scales = quantize_rows(tensor)
            tensors[f"{name}_scale"] = scales[:, None].clone()
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**source.hf_config, "dtype": "bfloat16", "eos_token_id": sorted(source.end_token_ids)}
    if quantization:
        config["quantization_config"] = quantization
    write_tokenizer(source.path, folder)
    _write_json(folder / "config.json", config)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of the model at `path` as transformers read it, into a folder."""
    tokenizer = read_tokenizer(path)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    _write_json(folder / "tokenizer_config.json", about)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
