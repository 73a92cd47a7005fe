"""`stallfree chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from stallfree.cli.chat_partners import ChatPartner, LocalPartner, Message, RemotePartner
from stallfree.cli.sampling import SamplingSettings
from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.flags import settings_of
from stallfree.engine.settings import API_KEY_VARIABLE, EngineSettings
from stallfree.errors import ConfigError, InvalidRequestError, StallfreeError

PROMPT = "> "
COMMANDS = """\
/help    show this
/reset   forget the conversation
/exit    leave, as Ctrl-D does
Ctrl-C   stop the answer"""
# Control characters but tab and newline: an answer must not steer the terminal.
UNPRINTED = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})
_DEFAULTS: dict[str, Any] = {"max_tokens": None, "temperature": 0.7}


def chat(
    engine: EngineSettings,
    sampling: SamplingSettings,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A server that speaks OpenAI's protocol, http://127.0.0.1:8000 for example; MODEL "
            "is then one of its models, its first by default.",
            show_default="an engine in this process",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar=API_KEY_VARIABLE, help="The server's key, with --url."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message that opens the chat.")
    ] = None,
) -> None:
    """Chat in the terminal, with a running server or an engine in this process.

    Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.
    """
    partner = _partner(engine, sampling, url, api_key)
    print(f"Chat with {partner.name}. /help lists the commands, Ctrl-D leaves.", file=sys.stderr)
    Conversation(partner, system).run()


class Conversation:
    """Reads lines from the terminal and prints the answers to them."""

    def __init__(self, partner: ChatPartner, system: str | None) -> None:
        self._partner = partner
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        """Go on until /exit or the end of the input."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() line editing and a history)
        while True:
            try:
                line = input(PROMPT if sys.stdin.isatty() else "").strip()
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self._messages = list(self._opening)
            print("(forgotten)")
        elif command == "/help":
            print(COMMANDS)
        else:
            print(f"{command} is no command\n{COMMANDS}")

    def _answer(self, text: str) -> None:
        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            for piece in self._partner.reply(messages):
                pieces.append(piece)
                print(piece.translate(UNPRINTED), end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except StallfreeError as error:
            print(f"\nstallfree: {error}", file=sys.stderr)
            return
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _partner(
    engine: EngineSettings, sampling: SamplingSettings, url: str | None, api_key: str | None
) -> ChatPartner:
    fields = _DEFAULTS | sampling.given()
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        raise ConfigError(str(error)) from error
    if url is not None:
        for setting in settings_of(EngineSettings):
            changed = getattr(engine, setting.field) != setting.default
            if changed and not setting.flag.positional:
                raise ConfigError(f"{setting.option} is for an engine in this process, not --url")
        given = {name: value for name, value in fields.items() if value is not None}
        return RemotePartner(url, engine.model, api_key, given)

    from stallfree.engine.llm import LLM

    return LocalPartner(LLM.from_settings(engine), params)
