"""The error tree. The web layer maps classes to status codes in one table (web/problems.py).

OkavangoError
├── InputError (ValueError)     what the user sent or wrote is wrong
│   ├── ConfigError             a setting or a configuration file
│   ├── DataError               a dataset; carries every fault found
│   ├── MediaError              a picture or sound that is not accepted
│   ├── PromptError             a conversation that cannot be rendered
│   │   └── ContextLengthError  one that is longer than the decoder's context
│   └── UnsupportedError        a decoder, encoder or adapter target that cannot be served
├── NotFoundError (LookupError) a base, adapter, version, alias, job or dataset that does not exist
├── ConflictError               the thing exists, but its state forbids this
├── NotReadyError               the thing exists, and will be usable later
├── IntegrityError              bytes that are not what their digest, manifest or probes say
│   ├── DownloadError           a download that is torn, or has the wrong digest
│   ├── BindError               a bundle's tensors do not fit the base completely
│   └── ParityError             serving does not reproduce what training saw
├── DeadlineError               a request was not done in the time that it allowed
└── BusyError                   a bounded queue is full; retry later
"""

from __future__ import annotations


class OkavangoError(Exception):
    """What was wrong, where, and what to do.

    Args:
        message: what was wrong, with the offending value.
        where: the place (file:line, field, parameter); shown before the message.
        remedy: what the reader can do about it; shown after the message.
    """

    code = "error"

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{place}{self.message}{remedy}"


class InputError(OkavangoError, ValueError):
    code = "invalid_request"


class ConfigError(InputError):
    code = "invalid_config"


class DataError(InputError):
    """A dataset with faults. `faults` holds one line of text a fault, in file order."""

    code = "invalid_data"

    def __init__(self, message: str, faults: tuple[str, ...] = (), **kwargs: str | None) -> None:
        super().__init__(message, **kwargs)
        self.faults = faults


class MediaError(InputError):
    code = "invalid_media"


class PromptError(InputError):
    code = "invalid_prompt"


class ContextLengthError(PromptError):
    code = "context_length_exceeded"


class UnsupportedError(InputError):
    code = "unsupported"


class NotFoundError(OkavangoError, LookupError):
    code = "not_found"


class ConflictError(OkavangoError):
    code = "conflict"


class NotReadyError(OkavangoError):
    code = "not_ready"


class IntegrityError(OkavangoError):
    code = "integrity"


class DownloadError(IntegrityError):
    code = "download_failed"


class BindError(IntegrityError):
    code = "bind_failed"


class ParityError(IntegrityError):
    code = "parity_failed"


class DeadlineError(OkavangoError):
    code = "timeout"


class BusyError(OkavangoError):
    """`retry_after`: seconds after which a retry is likely to be accepted."""

    code = "busy"

    def __init__(self, message: str, *, retry_after: float, **kwargs: str | None) -> None:
        super().__init__(message, **kwargs)
        self.retry_after = retry_after
