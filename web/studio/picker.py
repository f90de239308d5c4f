"""Which model answers: the names to choose from, and a card about the chosen one."""

from __future__ import annotations

from html import escape

from okavango.platform.catalog.records import VersionRecord
from okavango.web.services import Services
from okavango.web.studio.markup import badge, digest, when
from okavango.web.studio.scores import scores_of


def names(services: Services) -> list[str]:
    """The base, then by adapter its bare name, versions and aliases."""
    return [model.id for model in services.models.listed()]


def first_choice(services: Services) -> str:
    """The newest adapter by its bare name, or else the base: what somebody who just trained wants to try."""
    listed = [model for model in services.models.listed() if model.version and "@" not in model.id]
    newest = max(listed, key=lambda model: model.created, default=None)
    return newest.id if newest is not None else services.base.name


def card(services: Services, name: str) -> str:
    """What a name stands for now, as HTML."""
    listed = {model.id: model for model in services.models.listed()}
    model = listed.get(name)
    if model is None:
        return '<div class="okv-card okv-muted">Not in the list: it will be looked up when you ask.</div>'
    if model.version is None:
        return _base_card(services)
    return _version_card(name, model.version)


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
    return (
        f'<div class="okv-card"><div class="okv-card-head"><b>{escape(name)}</b>{arrow}{badge(version.state)}'
        f'</div><div>{digest(version.digest)} <span class="okv-muted">{when(version.created_at)}</span></div>'
        f'<div class="okv-scores">{scores}</div></div>'
    )
