"""One line of the log for the end of each request, and how lines look: as text or as JSON."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from stallfree.engine.observability_settings import ObservabilitySettings
from stallfree.server.request_note import GenerationNote, RequestNote

logger = logging.getLogger("stallfree.request")

_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")  # the others are for debugging
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/{}-")


def log_request(note: RequestNote) -> None:
    """Write the line of a request that ended."""
    level = logging.INFO if note.endpoint in _COMPLETIONS else logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(level, "request ended", extra={"fields": _fields(note)})


def _fields(note: RequestNote) -> dict[str, object]:
    """What is known of it; what is not known is left out."""
    fields: dict[str, object | None] = {
        "request_id": note.request_id,
        "endpoint": note.endpoint,
        "status": note.status,
        "duration_ms": _ms(note.ended_at - note.started_at),
        "trace_id": note.trace_id,
    }
    if note.generation is not None:
        fields |= _generated(note.generation)
    return {name: value for name, value in fields.items() if value is not None}


def _generated(note: GenerationNote) -> dict[str, object | None]:
    ttft_s = None if note.first_token_at is None else note.first_token_at - note.arrived_at
    fields: dict[str, object | None] = {
        "completion_id": note.completion_id,
        "tier": note.tier,
        "prompt_tokens": note.num_prompt_tokens,
        "output_tokens": note.num_output_tokens,
        "ttft_ms": _ms(ttft_s),
        "longest_gap_ms": _ms(note.longest_gap_s),
        "reason": note.reason,
    }
    if note.prompts is not None:
        fields["prompts"] = note.prompts
        fields["outputs"] = ["".join(note.texts.get(i, ())) for i in range(note.num_choices)]
    return fields


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


class TextFormatter(logging.Formatter):
    """A line for people: the message, then `name=value` for each field."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without a traceback."""
        fields: dict[str, object] = getattr(record, "fields", {})
        return " ".join(
            [super().formatMessage(record), *(f"{name}={_shown(v)}" for name, v in fields.items())]
        )


class JsonFormatter(logging.Formatter):
    """An object a line, for programs: time (ISO 8601, UTC), level, logger, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(settings: ObservabilitySettings) -> None:
    """Log to stderr as the settings say; of other libraries only warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler])
    logging.getLogger("stallfree").setLevel(level)


def _shown(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(value, default=str)
