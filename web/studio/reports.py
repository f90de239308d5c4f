"""The report of a data check, as HTML: the verdict, what the data hold, and every fault with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from okavango.web.studio.markup import facts
from okavango.web.studio.units import amount, size

_LONGEST = 3
_MEMORY = ("weights", "learned", "activations", "attention", "logits")


def report(found: Mapping[str, Any], *, brief: bool = False) -> str:
    """What POST /v1/datasets/check answers, for people; `brief`: without what only matters for learning."""
    held = facts([] if brief else _held(found))
    shown = [_verdict(found), _findings(found, "faults"), held, _warnings(found)]
    return f'<div class="okv-report">{"".join(shown)}</div>'


def checking(done: int) -> str:
    """While a check goes on, and so many bytes are done."""
    read = f"{size(done)} read" if done else "they are opened"
    return f'<div class="okv-report okv-muted" role="status">Checking the data … {read}</div>'


def _verdict(found: Mapping[str, Any]) -> str:
    counts = found["counts"]
    if found["ok"]:
        text, kind = f"No faults in {amount(counts['rows'], 'row')}", "okv-good"
    else:
        text, kind = amount(counts["faults"], "fault"), "okv-bad"
        if counts["faulty_rows"]:
            text += f" in {counts['faulty_rows']:,} of {amount(counts['rows'], 'row')}"
    if counts["warnings"]:
        text += f", {amount(counts['warnings'], 'warning')}"
    more = (
        "" if found["ok"] else "<div>Correct them and upload the file again: no job starts with them.</div>"
    )
    return f'<div class="okv-verdict {kind}" role="status"><b>{escape(found["file"])}</b>: {text}</div>{more}'


def _held(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts = found["counts"]
    if found["format"]:
        yield "read as", escape(found["format"])
    if counts["rows"]:
        yield "rows", f"{counts['rows']:,} with {amount(counts['messages'], 'message')}"
    if found["tokens"]:
        tokens = found["tokens"]
        yield "tokens", f"{counts['tokens']:,}; half of the rows have up to {tokens['p50']:,}"
        yield "longest rows", "; ".join(_place(place, "tokens") for place in found["longest_rows"][:_LONGEST])
    for modality, summary in found["media"].items():
        word = {"image": "pictures", "audio": "sounds"}.get(modality, modality)
        yield word, f"{summary['count']:,} distinct, the largest of {size(summary['largest'])}"
    if found["memory"]:
        memory = found["memory"]
        parts = ", ".join(f"{name} {size(memory[name])}" for name in _MEMORY if memory[name])
        total = f"about {size(memory['total'])} with the default settings, in batches of {memory['rows']:,}"
        yield "memory", f'<span title="{escape(parts)}">{total}</span>'


def _place(place: Mapping[str, Any], unit: str) -> str:
    where = f"line {place['line']:,}" if place["line"] == place["row"] else f"row {place['row']:,}"
    return f"{where} ({place['size']:,} {unit})"


def _warnings(found: Mapping[str, Any]) -> str:
    count = found["counts"]["warnings"]
    if not count:
        return ""
    return f"<details><summary>{amount(count, 'warning')}</summary>{_findings(found, 'warnings')}</details>"


def _findings(found: Mapping[str, Any], kind: str) -> str:
    listed, count = found[kind], found["counts"][kind]
    if not listed:
        return ""
    more = f"<p>… and {count - len(listed):,} more {kind}</p>" if len(listed) < count else ""
    return (
        f'<div class="okv-findings okv-{kind}" tabindex="0"><table class="okv-plain"><thead><tr><th>Line</th>'
        f"<th>Field</th><th>What, and what to do</th></tr></thead><tbody>{''.join(_rows(listed))}</tbody>"
        f"</table>{more}</div>"
    )


def _rows(listed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for finding in listed:
        line, row = finding["line"], finding["row"]
        place = f"{line:,}" if line is not None else f"row {row:,}" if row is not None else "all"
        cells = (place, f"<code>{escape(finding['field'])}</code>" if finding["field"] else "–")
        yield f"<tr><td>{cells[0]}</td><td>{cells[1]}</td><td>{escape(finding['text'])}</td></tr>"
