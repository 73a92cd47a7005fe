"""Flags generated from settings dataclasses.

A command declares parameters of a settings class; `with_settings` replaces them by one flag for
each field, and `--config`. A flag wins over its environment variable, that over the file, and the
file over the default. What the settings mean is not known here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from stallfree.cli.config_file import read_config_file
from stallfree.cli.endpoint_options import EndpointSettings, SloSettings
from stallfree.cli.sampling import SamplingSettings
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.flags import Setting, settings_of, written
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.engine.settings import EngineSettings, ServerSettings

SETTINGS_CLASSES: tuple[type, ...] = (
    EngineSettings,
    SchedulingSettings,
    ServerSettings,
    SamplingSettings,
    WorkloadSettings,
    SystemSettings,
    EndpointSettings,
    SloSettings,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="YAML file of settings, named as these flags are. A flag wins over the file.",
    ),
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each field of the settings classes among its parameters."""
    signature = inspect.signature(command, eval_str=True)
    classes: dict[str, type] = {}
    generated: dict[str, inspect.Parameter] = {}
    own: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.annotation in SETTINGS_CLASSES:
            classes[parameter.name] = parameter.annotation
            generated |= {s.name: _parameter(s) for s in settings_of(parameter.annotation)}
        else:
            own.append(parameter)

    @functools.wraps(command)
    def run(context: typer.Context, config: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in generated}
        given = {name: value for name, value in given.items() if _is_given(context, name)}
        from_file = read_config_file(config, _all_settings()) if config else {}
        for name, settings_class in classes.items():
            values[name] = _build(settings_class, given, from_file)
        command(**values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(p for p in generated.values() if _is_positional(p)),
        *(p.replace(kind=keyword) for p in own),
        inspect.Parameter("config", keyword, annotation=ConfigOption, default=None),
        *(p for p in generated.values() if not _is_positional(p)),
    ]
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(each.split()) for each in paragraphs)  # typer wraps it
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _build(settings_class: type, given: dict[str, Any], from_file: dict[str, object]) -> object:
    fields = {}
    for setting in settings_of(settings_class):
        if setting.name in given:
            fields[setting.field] = setting.read(given[setting.name])
        elif setting.name in from_file:
            fields[setting.field] = from_file[setting.name]
    return settings_class(**fields)


def _all_settings() -> list[Setting]:
    return [setting for each in SETTINGS_CLASSES for setting in settings_of(each)]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _is_positional(parameter: inspect.Parameter) -> bool:
    return any(isinstance(item, ArgumentInfo) for item in parameter.annotation.__metadata__)


def _parameter(setting: Setting) -> inspect.Parameter:
    flag = setting.flag
    shown: dict[str, Any] = {"help": flag.help, "metavar": flag.metavar or None}
    if flag.unset:
        shown["show_default"] = flag.unset
    info: ArgumentInfo | OptionInfo
    if flag.positional:
        info = typer.Argument(**shown)
    else:
        shown |= {"envvar": flag.variable, "rich_help_panel": flag.panel}
        is_on = setting.type is bool and setting.default  # and so needs a flag that turns it off
        off = f"/--no-{setting.option.removeprefix('--')}" if is_on else ""
        info = typer.Option(setting.option + off, **shown)
    default = written(setting.default, flag.parse)  # is shown, and not read
    default = list(setting.default) if setting.type is tuple else default
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[_annotation(setting), info],
        default=default,
    )


def _annotation(setting: Setting) -> Any:
    if setting.type is tuple:
        return list[str]
    kind = str if setting.flag.parse else setting.type
    return kind | None if setting.optional else kind
