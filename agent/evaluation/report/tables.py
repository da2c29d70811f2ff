"""The parts of the report that need no script: heading, notes, results, phases, configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from agent.evaluation.report.folders import Compared, Evaluation, Run, compare
from agent.evaluation.summary import describe
from data.text import counted

LABELS = {"before": "Before training", "after": "After training"}


def heading(run: Run) -> str:
    """Name, status and dates of the run, its notes, and what to know of its state."""
    info = run.info
    status = str(info.get("status", "unknown"))
    dates = {"started": info.get("created"), "updated": info.get("updated")}
    facts = [f"{name} {str(date).replace('T', ' ')[:16]}" for name, date in dates.items() if date]
    notes = info.get("notes") or []
    notes = [notes] if isinstance(notes, str) else notes
    reason = f'<p class="reason">{escape(str(info["reason"]))}</p>' if info.get("reason") else ""
    items = "".join(f"<p>{escape(str(note))}</p>" for note in notes)
    return (
        f'<p class="eyebrow">Sleuth {run.kind}</p><h1>{escape(run.name)}</h1>'
        f'<p class="facts"><span class="status {escape(status, quote=True)}">{escape(status)}</span> '
        f"{escape(' · '.join(facts))}</p>{reason}"
        + (f'<aside class="notes" aria-label="Notes"><h2>Note</h2>{items}</aside>' if items else "")
    )


def results(run: Run) -> str:
    """The table of scores: a column an evaluation, and the paired difference before to after."""
    if not run.evaluations:
        return '<p class="empty">No evaluation yet.</p>'
    compared = compare(run)
    first, differences = ("", {}) if isinstance(compared, str) else (_label(compared[0].name), compared[1])
    difference = next(iter(differences.values())) if len(run.evaluations) == 2 and differences else {}
    if {"before", "after"} <= {e.name for e in run.evaluations}:
        difference = differences.get("after", {})
    kinds = list(dict.fromkeys(kind for e in run.evaluations for kind in e.scores["by_kind"]))
    groups = [
        ("Exact match, 95 % interval", _em_rows(run, kinds, difference)),
        ("Searches a question", _search_rows(run, kinds)),
        ("All questions", _overall_rows(run, bool(difference))),
    ]
    if differences:
        groups.insert(1, (f"Flipped against {first}", _flip_rows(run, differences, bool(difference))))
    if differences and not difference:
        less = _less_rows(run, kinds, differences)
        groups.insert(1, (f"Exact match less that of {first}, paired", less))
    columns = "".join(f'<th scope="col">{_column(e)}</th>' for e in run.evaluations)
    if difference:
        columns += '<th scope="col">Difference <small>paired</small></th>'
    body = "".join(
        f'<tbody><tr class="group"><th colspan="{3 + len(run.evaluations)}">{title}</th></tr>'
        f"{''.join(rows)}</tbody>"
        for title, rows in groups
    )
    return (
        '<div class="scroll"><table class="results"><thead><tr><th></th><th scope="col">n</th>'
        f"{columns}</tr></thead>{body}</table></div>{_footnote(run, compared)}"
    )


def heat_map(run: Run) -> str:
    """A table of EM for each pair of limits, policies down and retrievers across; then the contrasts."""
    if run.matrix is None:
        return ""
    cells = list(run.matrix["cells"].values())
    across = dict.fromkeys(cell["retriever"] for cell in cells)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in across)
    parts = []
    for limits in dict.fromkeys((cell["top_k"], cell["searches"]) for cell in cells):
        own = [cell for cell in cells if (cell["top_k"], cell["searches"]) == limits]
        rows = "".join(
            f'<tr><th scope="row">{escape(policy)}</th>'
            + "".join(_warm(cell) for cell in own if cell["policy"] == policy)
            + "</tr>"
            for policy in dict.fromkeys(cell["policy"] for cell in own)
        )
        named = zip((("passage", "a search"), ("search", "at most")), limits, strict=True)
        title = ", ".join(f"{counted(limit, noun)} {of}" for (noun, of), limit in named if limit is not None)
        table = f'<table class="heat"><caption>{title}</caption><tr><th></th>{head}</tr>{rows}</table>'
        parts.append(f'<div class="scroll">{table}</div>')
    contrasts = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_signed(found)}</td></tr>'
        for name, found in run.matrix["contrasts"].items()
    )
    note = f"EM; below it less that of {run.matrix['baseline']}, paired, with its 95 % interval."
    more = f'<table class="phases">{contrasts}</table>' if contrasts else ""
    return f'<h3>Matrix</h3>{"".join(parts)}<p class="footnote">{escape(note)}</p>{more}'


def _warm(cell: Mapping[str, Any]) -> str:
    mean = cell["em"]["mean"]
    less = f"<br>{_signed(cell['difference'])}" if "difference" in cell else ""
    return f'<td style="--heat: {100 * mean:.0f}%"><b>{mean:.3f}</b>{less}</td>'


def phases(run: Run) -> str:
    """Wall time of each phase as bars; nothing where no phase was timed."""
    if not run.phases:
        return ""
    longest = max(run.phases.values()) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_duration(seconds)}</td>'
        f'<td class="bar"><svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{max(0.5, 100 * seconds / longest):.2f}" height="6"/></svg></td></tr>'
        for name, seconds in run.phases.items()
    )
    total = f'<tr class="total"><th scope="row">all</th><td>{_duration(sum(run.phases.values()))}</td>'
    return f'<h3>Wall time</h3><table class="phases">{rows}{total}<td></td></tr></table>'


def configuration(run: Run) -> str:
    """The resolved configuration, folded away; nothing where there is none."""
    if not run.config:
        return ""
    return (
        f"<details class='config'><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>"
    )


def _em_rows(run: Run, kinds: Iterable[str], difference: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind in (None, *kinds):
        cells = [_estimate(p["em"]) if (p := _part(e, kind)) else "–" for e in run.evaluations]
        if difference:
            part = difference if kind is None else difference["by_kind"].get(kind)
            cells.append(_signed(part["em"]) if part else "–")
        rows.append(_row(kind, run, cells))
    return rows


def _less_rows(run: Run, kinds: Iterable[str], differences: Mapping[str, Any]) -> list[str]:
    """The paired difference of each evaluation to the first, overall and by kind."""
    rows = []
    for kind in (None, *kinds):
        parts = [differences.get(e.name) for e in run.evaluations]
        own = [part and (part if kind is None else part["by_kind"].get(kind)) for part in parts]
        rows.append(_row(kind, run, [_signed(part["em"]) if part else "" for part in own]))
    return rows


def _flip_rows(run: Run, differences: Mapping[str, Any], wide: bool) -> list[str]:
    more = "<td></td>" * wide
    return [
        f'<tr><th scope="row">{name}</th><td></td>'
        + "".join(f"<td>{differences.get(e.name, {}).get(key, '')}</td>" for e in run.evaluations)
        + f"{more}</tr>"
        for name, key in (("fixed (wrong there, right here)", "fixed"), ("broken (right there)", "broken"))
    ]


def _search_rows(run: Run, kinds: Iterable[str]) -> list[str]:
    rows = []
    for kind in (None, *kinds):
        parts = [_part(e, kind) for e in run.evaluations]
        rows.append(_row(kind, run, [f"{p['searches_per_question']:.2f}" if p else "–" for p in parts]))
    return rows


def _overall_rows(run: Run, wide: bool) -> list[str]:
    names = {
        "Valid-format rate": lambda s: f"{s['valid_format_rate']:.3f}",
        "F1": lambda s: f"{s['f1']['mean']:.3f}",
        "Cover EM": lambda s: f"{s['cover_em']['mean']:.3f}",
        "Policy tokens a question": lambda s: f"{s['policy_tokens_per_question']:.0f}",
        "Failed searches (count as wrong)": lambda s: f"{s['search_failed']}",
    }
    shown = [
        {name: show(e.scores) for name, show in names.items()} | dict(describe(e.scores))
        for e in run.evaluations
    ]
    return [
        f'<tr><th scope="row">{escape(name[:1].upper() + name[1:])}</th><td></td>'
        + "".join(f"<td>{escape(of.get(name, ''))}</td>" for of in shown)
        + ("<td></td>" if wide else "")
        + "</tr>"
        for name in dict.fromkeys(name for of in shown for name in of)
        if name != "tokens written a question"
    ]


def _row(kind: str | None, run: Run, cells: Iterable[str]) -> str:
    name = "all questions" if kind is None else kind.replace("_", "-")
    counts = dict.fromkeys(str(p["n"]) for e in run.evaluations if (p := _part(e, kind)))
    return (
        f'<tr{" class=all" if kind is None else ""}><th scope="row">{escape(name)}</th>'
        f"<td>{' / '.join(counts)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    )


def _part(evaluation: Evaluation, kind: str | None) -> Mapping[str, Any] | None:
    """The scores overall, or of one kind; None where the evaluation has no such question."""
    return evaluation.scores if kind is None else evaluation.scores["by_kind"].get(kind)


def _estimate(estimate: Mapping[str, Any]) -> str:
    """A mean, its interval in small print, and both as a mark on a line from 0 to 1."""
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    if low is None:
        return f"<b>{mean:.3f}</b>"
    return (
        f"<b>{mean:.3f}</b> <small>[{low:.3f}, {high:.3f}]{_few(estimate)}</small>"
        '<svg class="range" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" y="2.5" width="100" height="1"/>'
        f'<rect x="{100 * low:.1f}" y="1.5" width="{max(0.8, 100 * (high - low)):.1f}" height="3"/>'
        f'<rect class="mean" x="{max(0.0, 100 * mean - 0.6):.1f}" width="1.2" height="6"/></svg>'
    )


def _signed(estimate: Mapping[str, Any]) -> str:
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    if low is None:
        return f"<b>{mean:+.3f}</b>"
    sure = "up" if low > 0 else "down" if high < 0 else "unsure"
    return f'<b class="{sure}">{mean:+.3f}</b> <small>[{low:+.3f}, {high:+.3f}]{_few(estimate)}</small>'


def _column(evaluation: Evaluation) -> str:
    unfinished = "" if evaluation.finished else " <small>unfinished</small>"
    return _label(evaluation.name) + unfinished


def _label(name: str) -> str:
    return escape(LABELS.get(name, name))


def _footnote(run: Run, compared: Compared | str) -> str:
    scores = run.evaluations[0].scores
    units = counted(scores["n"], "question")
    if scores["clusters"] < scores["n"]:
        units = f"{scores['clusters']:,} clusters of questions (those about one entity stay together)"
    text = f"Intervals: 95 % bootstrap, {scores['resamples']:,} resamples of {units}."
    if isinstance(compared, str):
        text += f" {compared}"
    return f'<p class="footnote">{escape(text)}</p>'


def _duration(seconds: float) -> str:
    """[7.25, 75, 3700] -> "7.2 s", "1 min 15 s", "1 h 1 min" """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _few(estimate: Mapping[str, Any]) -> str:
    return f" ({counted(estimate['few_clusters'], 'cluster')})" if "few_clusters" in estimate else ""
