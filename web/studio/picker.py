"""Which model answers: the names to choose from, and a card about the chosen one."""

from __future__ import annotations

from html import escape

from okavango.platform.catalog.records import VersionRecord
from okavango.platform.errors import OkavangoError
from okavango.web.services import Services
from okavango.web.studio.markup import badge, digest, fault, when
from okavango.web.studio.scores import scores_of
from okavango.web.studio.wording import explain


def names(services: Services) -> list[str]:
    """The base, then by adapter its bare name, versions and aliases."""
    return [model.id for model in services.models.listed()]


def first_choice(services: Services) -> str:
    """The newest adapter by its bare name, or else the base: what somebody who just trained wants to try."""
    listed = [model for model in services.models.listed() if model.version and "@" not in model.id]
    newest = max(listed, key=lambda model: model.created, default=None)
    return newest.id if newest is not None else services.base.name


def card(services: Services, name: str | None) -> str:
    """What a name stands for now, as HTML; also one that takes no requests. None: nothing is chosen yet."""
    if not name:
        return ""
    if name == services.base.name:
        return _base_card(services)
    try:
        return _version_card(name, services.catalog.resolve(name))
    except OkavangoError as error:
        return f'<div class="okv-card okv-muted">{escape(explain(error, name))}</div>'


def _base_card(services: Services) -> str:
    base = services.base
    encoders = ", ".join(base.encoders) or "text only"
    return (
        f'<div class="okv-card"><div class="okv-card-head"><b>{escape(base.name)}</b>'
        f'<span class="okv-badge okv-base">base</span></div>'
        f"<div>{digest(base.digest)}</div>"
        f'<div class="okv-muted">encoders: {escape(encoders)}</div></div>'
    )


def _version_card(name: str, version: VersionRecord) -> str:
    scores = "".join(
        f'<span class="okv-score">{escape(label)} <b>{value}</b></span>'
        for label, value in scores_of(version.metrics)
        if value
    )
    arrow = "" if name == version.ref else f'<span class="okv-muted">→ {escape(version.ref)}</span>'
    reason = fault(version.error) if version.error else ""
    return (
        f'<div class="okv-card"><div class="okv-card-head"><b>{escape(name)}</b>{arrow}{badge(version.state)}'
        f'</div><div>{digest(version.digest)} <span class="okv-muted">{when(version.created_at)}</span></div>'
        f'<div class="okv-scores">{scores}</div>{reason}</div>'
    )
