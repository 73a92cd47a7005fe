"""What a model computes in: chosen from the settings and what the device can do."""

from __future__ import annotations

import logging

import torch

from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError
from stallfree.model.config import ModelConfig
from stallfree.model.int8 import is_supported as is_int8_supported
from stallfree.model.int8 import obstacle as int8_obstacle
from stallfree.model.loading import Arithmetic

_BLOCK_TOKENS = 16  # a block of the KV cache is a multiple of these in int8

_log = logging.getLogger(__name__)


def choose_arithmetic(settings: EngineSettings, device: torch.device) -> Arithmetic:
    """int8 where it can be; else half precision where the device has it; else float32.

    Raises:
        ConfigError: the device has no arithmetic for the types that were asked for.
    """
    name = settings.dtype
    if name == "int8" or (name == "auto" and device.type == "cpu"):
        if device.type == "cpu" and is_int8_supported():
            return _int8(settings)
        problem = f"int8 needs an x86-64 CPU with AVX2 and PyTorch with libgomp; this is {device}"
        if name == "int8":
            raise ConfigError(f"dtype {problem}: use --dtype auto")
        _log.warning("%s without: the model runs in float32, several times slower", problem)
    return _floats(settings, device)


def arithmetic_for(
    config: ModelConfig, chosen: Arithmetic, settings: EngineSettings, device: torch.device
) -> Arithmetic:
    """What was chosen, if the model can be computed in it; if int8 cannot, float32.

    Raises:
        ConfigError: int8 was asked for and cannot.
    """
    obstacle = int8_obstacle(config)
    if not chosen.int8 or obstacle is None:
        return chosen
    problem = f"int8 is not implemented for {config.architecture} ({obstacle})"
    if settings.dtype == "int8":
        raise ConfigError(f"dtype {problem}: use --dtype auto")
    _log.warning("%s: the model runs in float32, several times slower", problem)
    return _floats(settings, device)


def _floats(settings: EngineSettings, device: torch.device) -> Arithmetic:
    name = settings.dtype
    if settings.kv_cache_dtype not in ("auto", name):
        raise ConfigError(
            f"kv_cache_dtype is {settings.kv_cache_dtype!r}; only with dtype int8 can it be "
            "another type than the weights': leave it out"
        )
    dtype = _float_type(name, device)
    return Arithmetic(int8=False, dtype=dtype, kv_dtype=dtype)


def _int8(settings: EngineSettings) -> Arithmetic:
    if settings.block_size % _BLOCK_TOKENS:
        raise ConfigError(
            f"block_size is {settings.block_size}; with dtype int8 it must be a multiple of "
            f"{_BLOCK_TOKENS}"
        )
    is_float32 = settings.kv_cache_dtype == "float32"
    return Arithmetic(
        int8=True,
        dtype=torch.float32,
        kv_dtype=torch.float32 if is_float32 else torch.bfloat16,
    )


def _float_type(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _is_native(torch.bfloat16, device) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    if not _is_native(dtype, device):
        raise ConfigError(
            f"dtype {name} has no native arithmetic on this {device.type} and would be several "
            "times slower than float32: use --dtype float32"
        )
    return dtype


def _is_native(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float32 or (device.type == "cuda" and dtype == torch.float16):
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = ("avx512_bf16", "amx_bf16", "bf16")  # the last is that of ARM
    if dtype == torch.float16:
        features = ("avx512_fp16", "amx_fp16", "fp16_arith")
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(feature, False) for feature in features)
