"""Engine and server settings: what they refuse, and how they say it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stallfree.cli.options import SETTINGS_CLASSES
from stallfree.engine.flags import parse_bytes, parse_duration, settings_of, written
from stallfree.engine.settings import EngineSettings, ServerSettings, available_cpus
from stallfree.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 1024**3),
        ("512MiB", 512 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("2g", 2 * 1024**3),
        (" 3 kb ", 3000),
        ("1T", 1024**4),
        ("12b", 12),
        ("1048576", 1_048_576),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "2 gigabytes", "-1GiB", "1e9", "2GiBB", "1,5GB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": " "}, "model is empty"),
        ({"revision": "v1"}, "revision is 'v1', but no model is named"),
        ({"scheduler": "sarthi"}, "scheduler is 'sarthi'; it must be one of sarathi, vllm"),
        ({"token_budget": 0}, "token_budget is 0; it must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"max_model_len": 1}, "max_model_len is 1; it must be at least 2"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0; it must be at least 1"),
        ({"kv_cache_memory_bytes": "2GiB"}, "kv_cache_memory_bytes is '2GiB'; it must be a whole"),
        ({"block_size": 257}, "block_size is 257; it must be at least 1 and at most 256"),
        ({"block_size": 16.0}, "block_size is 16.0; it must be a whole number"),
        ({"block_size": None}, "block_size is None; it must be a whole number"),
        ({"dtype": "int4"}, "dtype is 'int4'; it must be one of auto, float32"),
        ({"device": "CPU 1"}, "device is 'CPU 1'; write it as auto, cpu"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"threads": True}, "threads is True; it must be a whole number"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be at least"),
    ],
)
def test_engine_settings_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineSettings(**fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": ""}, "host is empty"),
        ({"port": -1}, "port is -1; it must be at least 0 and at most 65535"),
        ({"port": 65_536}, "port is 65536"),
        ({"api_key": ""}, "api_key must be ASCII and not blank"),
        ({"api_key": "schlüssel"}, "api_key must be ASCII"),
        ({"served_model_name": ""}, "served_model_name is empty"),
        ({"chat_template": Path("missing.jinja")}, "chat_template is missing.jinja; there is no"),
        ({"chat_template": Path("/")}, "chat_template is /; it is a folder"),
        ({"api_keys_file": Path("missing")}, "api_keys_file is missing; there is no such file"),
        ({"api_keys_file": Path("/dev/null")}, "api_keys_file is /dev/null; it is not a regular"),
        ({"tls_key": Path(__file__) / "x"}, f"tls_key is {__file__}/x; there is no such file"),
        ({"tls_cert": Path("x" * 999)}, f"tls_cert is {'x' * 999}; it cannot be read: File name"),
        ({"drain_timeout_s": -0.1}, "drain_timeout_s is -0.1; it must be at least 0"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s is nan; it must be finite"),
    ],
)
def test_server_settings_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**fields)
    assert str(caught.value).startswith(message)


def test_a_whole_number_is_a_number() -> None:
    assert ServerSettings(drain_timeout_s=0).drain_timeout_s == 0


def test_the_key_is_never_shown() -> None:
    assert "secret" not in repr(ServerSettings(api_key="secret"))
    with pytest.raises(ConfigError) as caught:
        ServerSettings(api_key=12345)  # type: ignore[arg-type]
    assert "12345" not in str(caught.value)


def test_more_threads_than_cpus_is_noted() -> None:
    assert EngineSettings(threads=1).notes == ()
    assert EngineSettings(tbt_slo_s=0.2, ttft_slo_s=2.0, prefill_order="edf").notes == ()
    (note,) = EngineSettings(tbt_slo_s=200.0).notes
    assert "200ms" in note
    (note,) = EngineSettings(prefill_order="edf").notes
    assert "ttft_slo_ms" in note
    (note,) = EngineSettings(threads=available_cpus() + 1).notes
    assert f"threads is {available_cpus() + 1}" in note


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_for_this_machine_needs_no_key(host: str) -> None:
    assert ServerSettings(host=host).notes == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_server_for_all_without_a_key_is_noted(host: str) -> None:
    (note,) = ServerSettings(host=host).notes
    assert f"host is {host} and there is no key" in note
    assert ServerSettings(host=host, api_key="secret").notes == ()
    assert ServerSettings(host=host, api_keys_file=Path(__file__)).notes == ()


@pytest.mark.parametrize("settings_class", SETTINGS_CLASSES)
def test_every_setting_explains_itself(settings_class: type) -> None:
    for setting in settings_of(settings_class):
        assert setting.flag.help.endswith((".", "..."))
        assert not setting.optional or setting.flag.unset, f"{setting.name}: what is its default?"


@pytest.mark.parametrize("settings_class", SETTINGS_CLASSES)
def test_a_default_is_written_as_it_is_read(settings_class: type) -> None:
    for setting in settings_of(settings_class):
        text = written(setting.default, setting.flag.parse)
        if isinstance(text, str):
            assert setting.read(text) == setting.default


def test_values_are_written_with_their_units() -> None:
    sizes = (1 << 20, 16 << 10, 3 << 30, 1000, 0)
    assert [written(size, parse_bytes) for size in sizes] == ["1MiB", "16KiB", "3GiB", 1000, 0]
    times = (10.0, 0.2, 1.5, 0)
    assert [written(each, parse_duration) for each in times] == ["10s", "200ms", "1.5s", "0s"]
    assert written(10.0, None) == 10.0
    assert written(None, parse_bytes) is None


def test_settings_of_one_name_are_read_alike() -> None:
    """A settings file is read by name, whichever command it is for."""
    kinds: dict[str, tuple[object, object]] = {}
    for each in SETTINGS_CLASSES:
        for setting in settings_of(each):
            own = (setting.type, setting.flag.parse)
            assert kinds.setdefault(setting.name, own) == own, setting.name
