"""Errors that a caller may want to catch; `scripts/__main__.py` prints any as one line, exit status 2."""

from collections.abc import Callable


class SleuthError(Exception):
    """Base of all errors that Sleuth raises on purpose."""


class ConfigError(SleuthError, ValueError):
    """A configuration value or argument is wrong: says what was given, what is allowed, and where."""


class DataError(SleuthError, ValueError):
    """A file is malformed: says which file, which line, and what is wrong with it."""


class StorageError(SleuthError, OSError):
    """Writing failed (disk full, no permission); what was there before is still there."""


class CorpusChanged(SleuthError):
    """A passage or vector is no longer what was indexed: a file was rewritten or damaged (servers: 5xx)."""


class RetrieverError(SleuthError):
    """A search could not be answered. Never turned into an empty result."""


class RetrieverUnavailable(RetrieverError):
    """No server answers, or it answers 5xx, until the deadline has passed."""


class RetrieverTimeout(RetrieverError):
    """A request took longer than the deadline allows."""


class RetrieverRefused(RetrieverError):
    """The server answered 4xx: the request itself is wrong, so it is not retried."""


class ToolUnavailable(RetrieverError):
    """A tool of an MCP server did not answer in time, or what answers is no such server."""


class EngineError(SleuthError):
    """The engine died, or was asked for something it cannot do."""


class RunStopped(SleuthError):
    """The run stopped before its end with its state saved; the message says how to go on."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless `ok`: what was given, what is allowed."""
    if not ok:
        raise ConfigError(f"{name} = {value!r}: must be {allowed}")


_RANGES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda value: value > 0,
    ">= 0": lambda value: value >= 0,
    ">= 1": lambda value: value >= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
}


def require_range(config: object, group: str, allowed: str, *names: str) -> None:
    """Raise ConfigError unless these fields of a configuration lie in a range, such as ">= 1".

    group: precedes their names in the error, such as "rollout."
    """
    for name in names:
        value = getattr(config, name)
        require(_RANGES[allowed](value), f"{group}{name}", value, allowed)


def require_template(template: str, name: str, other: str) -> None:
    """Raise ConfigError unless the template of a query names {query}, and {other} alone beside it."""
    try:
        made = template.format(query="\0", **{other: ""})
    except (LookupError, AttributeError, ValueError):
        made = ""
    require("\0" in made, name, template, f"a text that names {{query}}, and may name {{{other}}}")


def reason_of(error: BaseException) -> str:
    """Return what went wrong, without the name of the file: the text of a system's error, else its own."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)


def unreadable(error: OSError | ValueError) -> str:
    """Return why a file cannot be read."""
    return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason_of(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of a library says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
