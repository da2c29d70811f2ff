"""`sleuth push`: a trained policy or retriever to the Hugging Face hub, with a card made from its run."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from data.errors import ConfigError, first_line, require
from data.models.hub import log_in_where_refused
from data.text import counted

LEFT_HERE = [
    "optimizer*",
    "trainer.json",
    "trainer_state.json",
    "checkpoint.json",
    "checkpoints/*",
    "*.pt",
    "README.md",
]
"""Files left out: those that resume training, and the card, which is written anew."""


def expand(argv: list[str]) -> list[str]:
    """The folder and the name, which need no option's name."""
    from scripts.command_line import bare_words

    words, rest = bare_words(argv)
    names = ("--folder", "--name")
    if len(words) > len(names):
        raise ConfigError(f"{words[2]!r}: push takes a folder and a name")
    return [*(f"{name}={word}" for name, word in zip(names, words, strict=False)), *rest]


def main(
    folder: Path,
    name: str,
    licence: str,
    results: list[Path] | None = None,
    private: bool = True,
    dry_run: bool = False,
) -> None:
    """Push a trained policy or retriever to the hub, with a model card made from its run.

    Args:
        folder: Of a run, of which the best checkpoint is taken, or of a model.
        name: Of the repository: owner/name.
        licence: Identifier of the hub, such as apache-2.0: that of the base usually binds.
        results: Folders of `sleuth evaluate` or `sleuth evaluate-retriever`; none: the run's own.
        private: Make the repository private where it is new.
        dry_run: Print the card and the files; nothing is sent.
    """
    from huggingface_hub.utils import filter_repo_objects, validate_repo_id

    from scripts.model_card import LICENCES, evaluations_of, find_trained, render_card

    require("/" in name, "name", name, "owner/name")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(f"name = {name!r}: must be owner/name ({first_line(error)})") from None
    known = LICENCES.split()
    near = ", ".join(difflib.get_close_matches(licence.lower(), known) or known[:3])
    require(licence in known, "licence", licence, f"an identifier of the hub ({near}, ..., or other)")
    trained = find_trained(folder.expanduser())
    card = render_card(trained, name, licence, evaluations_of(trained) if results is None else results)
    files = sorted(str(at.relative_to(trained.folder)) for at in trained.folder.rglob("*") if at.is_file())
    sent = list(filter_repo_objects(files, ignore_patterns=LEFT_HERE))
    if dry_run:
        print(card)
        return print("files:", *sent, "README.md")
    url = _send(trained.folder, name, card, private)
    print(f"pushed {counted(len(sent) + 1, 'file')} of {trained.folder} to {url}")


def _send(folder: Path, name: str, card: str, private: bool) -> Any:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=LEFT_HERE)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name)
    except Exception as error:  # the hub's client lets through what its HTTP library of the day raises
        why = f"{type(error).__name__}: {first_line(error)}{log_in_where_refused(error)}"
        raise ConfigError(f"push to {name}: {why}") from error
    return url
