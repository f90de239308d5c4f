"""The adapters page's HTML: every version as a row, and all that is known of one version."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from okavango.platform.catalog.names import DEFAULT_ALIAS
from okavango.platform.catalog.records import AdapterRecord, VersionRecord
from okavango.web.studio.markup import badge, digest, facts, fault, mapping, when
from okavango.web.studio.scores import SCORES, scores_of

NONE_YET = (
    '<div class="okv-empty"><b>No adapter yet</b><br>'
    "<code>okavango train --base … --data … --name …</code> makes one.</div>"
)
_STATES = {
    "registered": "waits for the parity gate",
    "ready": "its probes were reproduced; it takes requests",
    "bound": "every tensor binds, but it brought no probes; it takes requests",
    "refused": "failed the parity gate; it takes no requests",
    "retired": "takes no requests any more",
}


def table(adapters: Sequence[AdapterRecord], selected: str) -> str:
    """All versions, newest first within an adapter. `selected` is a ref such as emoji@2."""
    if not adapters:
        return NONE_YET
    heads = (
        "Version",
        "State",
        "Aliases",
        *(label for label, _ in SCORES.values()),
        "Base",
        "Digest",
        "Created (UTC)",
    )
    rows = (
        _row(adapter, version, selected) for adapter in adapters for version in reversed(adapter.versions)
    )
    cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return (
        f'<div class="okv-table-frame"><table class="okv-table"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def details(adapter: AdapterRecord, version: VersionRecord) -> str:
    """One version: where it comes from, how good it is, what the gate found."""
    told = {
        "Scores": version.metrics,
        "Parity gate": version.verification,
        "Binds to": version.components,
        "Lineage": version.lineage,
    }
    error = fault(version.error) if version.error else ""
    sections = [_section("Version", facts(_identity(adapter, version)))]
    sections += [_section(title, mapping(values)) for title, values in told.items() if values]
    head = f'<div class="okv-card-head"><b>{escape(version.ref)}</b>{_badge(version)}</div>'
    return f'<div class="okv-details">{head}{error}<div class="okv-sections">{"".join(sections)}</div></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h4>{escape(title)}</h4>{body}</section>"


def _row(adapter: AdapterRecord, version: VersionRecord, selected: str) -> str:
    cells = [
        f"<b>{escape(version.ref)}</b>",
        _badge(version),
        _aliases(adapter, version),
        *(f'<span class="okv-number">{value or "–"}</span>' for _, value in scores_of(version.metrics)),
        escape(version.base),
        digest(version.digest),
        when(version.created_at),
    ]
    labels = ("", "State", "Aliases", *(label for label, _ in SCORES.values()), "Base", "Digest", "Created")
    filled = "".join(
        f'<td data-label="{escape(label)}">{cell}</td>' for label, cell in zip(labels, cells, strict=True)
    )
    chosen = str(version.ref == selected).lower()
    return f'<tr data-ref="{escape(version.ref)}" tabindex="0" aria-selected="{chosen}">{filled}</tr>'


def _identity(adapter: AdapterRecord, version: VersionRecord) -> list[tuple[str, str]]:
    pairs = [
        ("state", f"{escape(version.state)}: {escape(_STATES[version.state])}"),
        ("aliases", _aliases(adapter, version) or "–"),
        ("base", f"{escape(version.base)} {digest(version.base_digest)}"),
        ("digest", digest(version.digest)),
        ("media", escape(", ".join(version.modalities)) or "text only"),
        ("created", f"{when(version.created_at)} by {escape(version.principal)}"),
    ]
    return pairs + ([("job", escape(version.job_id))] if version.job_id else [])


def _aliases(adapter: AdapterRecord, version: VersionRecord) -> str:
    named = [alias.name for alias in adapter.aliases if alias.version == version.version]
    return " ".join(f'<span class="okv-alias">{escape(name)}</span>' for name in named)


def _badge(version: VersionRecord) -> str:
    return badge(version.state, version.error or _STATES[version.state])


def promotion(adapter: AdapterRecord, version: VersionRecord) -> str:
    """What the move of prod would change, as a question."""
    now = next((alias.version for alias in adapter.aliases if alias.name == DEFAULT_ALIAS), None)
    name = f"{escape(adapter.name)}@{DEFAULT_ALIAS}"
    if now is None:
        change = f"Requests for <b>{escape(adapter.name)}</b> and <b>{name}</b> will be answered by"
    else:
        change = f"<b>{name}</b> is {escape(adapter.name)}@{now}. From now on it will be"
    return (
        f"<div>{change} <b>{escape(version.ref)}</b>. Answers in progress keep the version they have.</div>"
    )
