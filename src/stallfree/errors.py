"""Every error that stallfree raises on purpose.

    StallfreeError
    ├── ConfigError                    a setting or a flag is wrong: nothing has started
    ├── ModelError                     the model on disk cannot be used
    │   ├── UnsupportedModelError      its architecture, or a feature of it, is not implemented
    │   ├── WeightFileError            a weight file is corrupt, truncated, hostile or incomplete
    │   └── TokenizerError             no usable tokenizer or chat template
    ├── InvalidRequestError            one request is wrong; nobody else is affected
    │   └── ContextLengthError         more tokens than the context or the KV cache holds
    ├── OverloadedError                a request is refused because too much waits
    ├── EndpointError                  a server that is to be measured cannot be
    └── EngineError                    a request that was accepted cannot be finished
        ├── ExecutorError              the iteration that held the request failed
        │   ├── OutOfMemoryError       there was no memory to run it
        │   └── CopyError              KV could not be copied to or from the swap space
        ├── WorkersLostError           a process of the model has ended, or does not answer
        ├── ReplicaLostError           the copy of the model that ran the request has ended
        ├── NoReplicaError             no copy of the model is ready at the moment
        └── EngineStoppedError         the engine is draining, stopped or dead

A message names the offending value and the limit, and says what to do where that is not obvious.
"""

from __future__ import annotations


class StallfreeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(StallfreeError):
    """A setting is invalid; the message names it, its value and the limit."""


class ModelError(StallfreeError):
    """A model cannot be loaded."""


class UnsupportedModelError(ModelError):
    """The model uses an architecture or feature that is not implemented."""


class WeightFileError(ModelError):
    """A weight file is corrupt, truncated, hostile or incomplete."""


class TokenizerError(ModelError):
    """The model has no usable tokenizer or chat template."""


class InvalidRequestError(StallfreeError):
    """A request is invalid.

    `param` is the name of the offending field as the client sent it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """A request asks for more tokens than the context or the KV cache can hold."""


class OverloadedError(StallfreeError):
    """A request is refused because too much waits; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        """For another process: an exception is made again from all it was made from."""
        return type(self), (str(self), self.retry_after_s)


class EndpointError(StallfreeError):
    """A server that is to be measured cannot be reached, or refuses to be."""


class EngineError(StallfreeError):
    """A request that was accepted cannot be finished."""


class ExecutorError(EngineError):
    """The iteration that held the request failed; other requests go on."""


class OutOfMemoryError(ExecutorError):
    """There was no memory to run the request, even alone; later there may be."""


class CopyError(ExecutorError):
    """KV could not be copied between the KV cache and the swap space: nothing else was run."""


class WorkersLostError(EngineError):
    """A process of the model has ended or does not answer; nothing runs without it.

    `no_memory` says whether it ended for want of memory for a batch.
    """

    def __init__(self, message: str, *, no_memory: bool = False) -> None:
        super().__init__(message)
        self.no_memory = no_memory


class ReplicaLostError(EngineError):
    """The copy of the model that ran the request has ended, after part of the answer was sent."""


class NoReplicaError(EngineError):
    """No copy of the model is ready to take the request; one is being started."""


class EngineStoppedError(EngineError):
    """The engine takes no more requests: it is draining, stopped or dead."""
