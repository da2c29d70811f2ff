"""The model card of a trained folder, out of what its run left on disk: nothing is typed in by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agent.evaluation.summary import table
from data.checkpoint import best_checkpoint, latest_checkpoint
from data.errors import ConfigError
from data.jsonl import read_json, read_jsonl
from data.metrics.significance import estimate, format_estimate
from data.models.hub import MODEL_FILES
from data.text import markdown_table
from rl.demonstrations import RECORD_FILE, warm_start_notes

LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
"""Identifiers that the hub takes in a card (huggingface.co/docs/hub/repositories-licenses)."""
_DATA = ("questions", "dev_questions", "retriever", "train", "dev", "corpus", "demonstrations", "invented")


@dataclass(frozen=True)
class Trained:
    """A folder of a model, with what its run says of it."""

    folder: Path
    run: Path | None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Kind of model: of models of sentence-transformers those with a spec of ours make vectors."""
        if (self.folder / "encoding_spec.json").is_file():
            return "retriever"
        own = ("modules.json", "config_sentence_transformers.json")
        return "reranker" if any((self.folder / file).is_file() for file in own) else "policy"

    @property
    def task(self) -> str:
        """The hub's name for what it does, by which it is found there."""
        if self.kind == "policy" and (self.folder / "preprocessor_config.json").is_file():
            return "image-text-to-text"
        return _TASKS[self.kind]


_TASKS = {"retriever": "sentence-similarity", "reranker": "text-ranking", "policy": "text-generation"}
_USE = {
    "retriever": "sleuth index --encoder {name} --corpus corpus.jsonl --out index",
    "policy": 'sleuth ask "..." --policy {name} --retriever index',
}


def find_trained(folder: Path) -> Trained:
    """Return the model in a folder, or that of a run: `model`, or its best checkpoint. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"folder = {str(folder)!r}: no such folder")
    run = next((at for at in (folder, *folder.resolve().parents[:2]) if (at / "run.json").is_file()), None)
    model = folder
    if run == folder and not (model := folder / "model").is_dir():
        best = best_checkpoint(folder / "checkpoints")
        found = best[0] if best else latest_checkpoint(folder / "checkpoints")
        model = found.path if found else folder
    if not any((model / file).is_file() for file in MODEL_FILES):
        raise ConfigError(f"folder = {str(folder)!r}: holds no model: none of {', '.join(MODEL_FILES)}")
    if run is None:
        record = model / RECORD_FILE
        notes = warm_start_notes(str(model))
        return Trained(model, None, read_json(record) if record.is_file() else {}, notes)
    info, config = read_json(run / "run.json"), yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    why = f": {info['reason']}" if info.get("reason") else ""
    unfinished = [f"The run did not finish{why}."] if info["status"] != "finished" else []
    return Trained(model, run, config, [*info.get("notes", []), *unfinished], info.get("inputs", {}))


def evaluations_of(trained: Trained) -> list[Path]:
    """Return the folders of the run's own evaluations of this very checkpoint."""
    step = trained.folder.name.removeprefix("step-")
    at = trained.run / "evaluations" / f"dev-{step}" if trained.run else None
    return [at] if at and (at / "scores.json").is_file() else []


def render_card(trained: Trained, name: str, licence: str, results: Sequence[Path]) -> str:
    """Return the card: base, data, recipe, results with intervals, limits, licence."""
    base = _base_of(trained.config)
    head: dict[str, Any] = {
        "license": licence,
        "library_name": "transformers" if trained.kind == "policy" else "sentence-transformers",
        "pipeline_tag": trained.task,
        "tags": ["sleuth", trained.kind],
    }
    if base and base.count("/") == 1 and not Path(base).exists():
        head["base_model"] = base
    use = f"\n\n```sh\n{_USE[trained.kind].format(name=name)}\n```" if trained.kind in _USE else ""
    told = [f"- {note}" for note in trained.notes]
    if not results:
        told.append("- It was not evaluated: no results came with it.")
    recipe = yaml.safe_dump(_without_places(trained.config), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}\n\nA {trained.kind}, trained with Sleuth.{use}",
        f"## Base\n\n{_without_places(base) if base else 'Not recorded.'}",
        f"## Data\n\n{_data(trained)}",
        f"## Recipe\n\n```yaml\n{recipe}```" if trained.config else "## Recipe\n\nNot recorded.",
        "## Results\n\n" + ("\n\n".join(map(_result, results)) or "None."),
        "## Limits\n\n" + ("\n".join(told) or "- None are recorded beyond what the results show."),
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(parts) + "\n"


def _base_of(config: Mapping[str, Any]) -> str | None:
    """Return what was trained: a policy, or what a retriever's model is built on."""
    found = config.get("policy") or config.get("model")
    if isinstance(found, Mapping):
        return found.get("init_args", {}).get("base") or found["class_path"]
    return found


def _data(trained: Trained) -> str:
    rows = [
        f"- {key}: `{yaml.safe_dump(_without_places(trained.config[key]), default_flow_style=True).strip()}`"
        f"{f' (hash {trained.inputs[key]})' if key in trained.inputs else ''}"
        for key in _DATA
        if (given := trained.config.get(key)) and not _is_unused(given)
    ]
    return "\n".join(rows).replace("\n...", "") or "Not recorded."


def _is_unused(data: Any) -> bool:
    """Return whether it is the development set of a retriever that had none."""
    return isinstance(data, Mapping) and "queries" in data and not data["queries"]


def _result(folder: Path) -> str:
    """Return the table of an evaluation, of a policy or a retriever. ConfigError where it is none."""
    try:
        columns, rows = _scores_in(folder)
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"results: {folder} holds no whole evaluation") from error
    said = f"`{folder.name}`, with intervals of 95 % over clusters of questions"
    return f"{said}:\n\n{markdown_table(columns, rows).rstrip()}"


def _scores_in(folder: Path) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return the columns and rows of the table of an evaluation."""
    if (folder / "queries.jsonl").is_file():
        scored = [row["scores"] for row in read_jsonl(folder / "queries.jsonl")]
        return ("metric", "queries", "mean [95 %]"), [
            (metric, str(len(values)), _estimate(values))
            for metric in scored[0]
            if (values := [row[metric] for row in scored if metric in row])
        ]
    if (folder / "scores.json").is_file():
        return table(read_json(folder / "scores.json"))
    raise ConfigError(f"results: {folder} holds neither scores.json nor queries.jsonl of an evaluation")


def _estimate(values: Sequence[float]) -> str:
    [found] = estimate(np.array(values)[:, None], list(map(str, range(len(values)))))
    return format_estimate(found)


def _without_places(value: Any) -> Any:
    """Return the value with the last name of each path of this machine."""
    if isinstance(value, Mapping):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", ".")) or os.path.exists(value))
    return Path(value).name if is_path else value
