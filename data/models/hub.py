"""The one way to a model or a data set by name: a folder, a short name, or a name of the Hugging Face hub.

It is seen to be there before anything slow is imported. The hub is asked once, for a few seconds; where it
cannot be reached, all that comes after works offline, from the hub's cache on this machine.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import ConfigError, first_line
from data.models.packaged import SHORT_NAMES

logger = logging.getLogger(__name__)

HUB_SECONDS = 5.0
"""The longest wait for the hub to say whether it has a name."""
MODEL_FILES = ("config.json", "modules.json", "adapter_config.json")
"""A folder with one of these is a model."""
LOG_IN = " (`hf auth login`)"
LOCAL = "; a local .jsonl, .json or .parquet file needs no hub"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_model(name: str, what: str, files: Sequence[str] = MODEL_FILES) -> str:
    """Return the folder of a short name, else a folder or hub name as it is, seen to be there.

    what: begins the message, such as "policy". files: one of them makes a folder a model.
    Raises ConfigError in one line: what was given, what is allowed, and what was probably meant.
    """
    _bound_retries()
    if name in SHORT_NAMES:
        return str(SHORT_NAMES[name]())
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        _check_model(folder, what, files)
        return str(folder)
    if folder.is_file():
        raise ConfigError(f"{what} = {name!r}: is a file, must be the folder of a model")
    if reason := _why_not_on_hub(name, "model"):
        known = f"no folder, no short name ({', '.join(SHORT_NAMES)})"
        raise ConfigError(f"{what} = {name!r}: {known}, and {reason}{_hint(name, SHORT_NAMES)}")
    return name


def find_dataset(name: str, what: str) -> None:
    """Raise ConfigError, as `find_model`, unless the hub or its cache here has the data set."""
    _bound_retries()
    if reason := _why_not_on_hub(name, "dataset"):
        raise ConfigError(f"{what} = {name!r}: no file or folder, and {reason}{_hint(name) or LOCAL}")


def _check_model(folder: Path, what: str, files: Sequence[str]) -> None:
    places = (folder, folder / "actor", folder.parent)
    shards = next((at for at in places if any(at.glob("model_world_size_*_rank_*.pt"))), None)
    if shards and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{what} = {str(folder)!r}: holds the shards of verl's trainer; make one model of them by "
            f"`python -m verl.model_merger merge --backend fsdp --local_dir {shards} --target_dir DIR`"
        )
    if not any((folder / file).is_file() for file in files):
        found = [*folder.glob(f"*/{files[0]}"), *folder.glob(f"*/*/{files[0]}")]  # a run: its checkpoints
        below = sorted(str(path.parent) for path in found)
        hint = f"; did you mean {' or '.join(below[-3:])}?" if below else ""
        raise ConfigError(f"{what} = {str(folder)!r}: holds no {files[0]}, so it is no model{hint}")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # what it stands on may be of the hub
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base:
            find_model(str(base), f"{what} {str(folder)!r}: base_model_name_or_path")


def _why_not_on_hub(name: str, kind: str) -> str:
    """The reason why the hub gives no such model or data set; "" where it, or its cache here, does."""
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        return "no name of the hub"
    from huggingface_hub import constants

    switched_off = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    reason = next(iter(_offline), switched_off) or _ask_hub(name, kind)
    cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "snapshots")
    if reason and cached.is_dir() and any(cached.iterdir()):
        logger.warning("%s is taken from the hub's cache: %s", name, reason)
        _go_offline(reason)
        return ""
    return reason


def _ask_hub(name: str, kind: str) -> str:
    """Ask the hub whether it has the name: "", or why not. Without an answer, go offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    answers: list[Exception] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a name server that hangs obeys no timeout
    thread.start()
    thread.join(HUB_SECONDS)
    if thread.is_alive():
        answers.append(TimeoutError(f"no answer within {HUB_SECONDS:g} s"))
    if not answers:
        return ""
    if isinstance(answers[0], GatedRepoError):
        return f"the hub gives it to those alone who were granted access{LOG_IN}"
    if isinstance(answers[0], RepositoryNotFoundError):
        return f"the hub has no such {kind}, or it is private{LOG_IN}"
    if isinstance(answers[0], HfHubHTTPError):
        return f"the hub refuses it ({first_line(answers[0])}){log_in_where_refused(answers[0])}"
    _go_offline(f"the hub cannot be reached ({first_line(answers[0])})")
    return _offline[0]


def log_in_where_refused(error: Exception) -> str:
    """Return the hint to log in where the hub answered that the token is wrong, or may not."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return LOG_IN if status in (401, 403) else ""


_offline: list[str] = []
"""The reason why the hub is asked no more, once it is."""


def _go_offline(reason: str) -> None:
    """Let everything that asks the hub, here and in processes started from here, use its cache alone."""
    from huggingface_hub import constants

    _offline.append(reason)
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


@cache
def _bound_retries() -> None:
    """Make the first connection to the hub that fails the last one: libraries repeat each five times."""
    from huggingface_hub import constants, get_session, set_client_factory

    first = get_session()

    def client() -> Any:
        made: Any = type(first)(event_hooks=first.event_hooks, follow_redirects=True, timeout=None)
        send, reached = made.send, False

        def bounded(request: Any, **options: Any) -> Any:
            nonlocal reached
            try:
                response = send(request, **options)
            except Exception as error:
                unreachable = type(error).__name__ in ("ConnectError", "ConnectTimeout")
                if unreachable and not reached and request.url.host == urlsplit(constants.ENDPOINT).hostname:
                    _go_offline(f"the hub cannot be reached ({first_line(error)})")
                raise
            reached = True
            return response

        made.send = bounded
        return made

    set_client_factory(client)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry


def _hint(name: str, known: Iterable[str] = ()) -> str:
    """`; did you mean ...?` with the known names, and the folders beside it, that are spelt alike."""
    path = Path(name).expanduser()
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [*difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
    close += [
        str(path.with_name(each)) for each in difflib.get_close_matches(path.name, beside, n=2, cutoff=0.7)
    ]
    return f"; did you mean {' or '.join(close)}?" if close else ""
