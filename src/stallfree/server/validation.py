"""Bodies that hold no field which is not known, and what a client is told of one that is wrong.

A field that would change the answer and is not implemented is refused, never ignored; fields that
only concern OpenAI's own service are ignored. What the fields are: `protocol.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from stallfree.errors import InvalidRequestError
from stallfree.server.fields import refusal, shown

BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """A JSON object whose every field is known; one that is null is as good as absent.

    Attributes:
        IGNORED: fields that are taken and mean nothing here.
        UNSUPPORTED: fields that are refused, but for the values that ask for nothing.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            if name in cls.UNSUPPORTED:
                if value[name] is not None and value[name] not in cls.UNSUPPORTED[name]:
                    raise refusal("is not supported by this server", name)
            elif name not in cls.model_fields and name not in cls.IGNORED:
                raise PydanticCustomError("unrecognized", "not known", {"field": name})
        return {name: entry for name, entry in value.items() if entry is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON schema, as true as the checks of names above are."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema.setdefault("properties", {})
        for name in properties.keys() - set(schema.get("required", ())):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        properties |= {name: {} for name in cls.IGNORED}
        properties |= {name: {"enum": [None, *few]} for name, few in cls.UNSUPPORTED.items()}
        schema["additionalProperties"] = False
        return schema


def parse(body_type: type[BodyT], value: Mapping[str, Any]) -> BodyT:
    """Validate a request body.

    Raises:
        InvalidRequestError: names the first field that is wrong, its value and what it must be.
    """
    try:
        return body_type.model_validate(value)
    except ValidationError as failure:
        raise _first_error(failure) from None


def _first_error(failure: ValidationError) -> InvalidRequestError:
    error = failure.errors(include_url=False)[0]
    field = error.get("ctx", {}).get("field")
    param = _path([*error["loc"], *([field] if field else [])])
    reason = error["msg"].replace("Input should", "it must", 1)
    reason = reason.replace("String should", "it must", 1)
    match error["type"]:
        case "refusal":
            message = f"{param} {reason}"
        case "unrecognized":
            message = f"Unrecognized request argument supplied: {param}"
        case "missing":
            message = f"{param} is required"
        case "model_type" | "dict_type":
            message = f"{param} is {shown(error['input'])}; it must be an object"
        case "too_short":
            message = f"{param} is {shown(error['input'])}; it must have at least 1"
        case "too_long":
            message = (
                f"{param} is {shown(error['input'])}; {error['ctx']['max_length']} are the limit"
            )
        case _:
            message = f"{param} is {shown(error['input'])}; {reason}"
    return InvalidRequestError(message, param)


def _path(steps: Iterable[int | str]) -> str:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")
