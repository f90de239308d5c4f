"""The catalog: what exists, under which name, in which state; and who works on what.

It knows nothing of bundles' bytes (artifacts.py), of torch or of the web.
"""

from __future__ import annotations

from okavango.platform.catalog.adapters import Adapters
from okavango.platform.catalog.assets import Assets
from okavango.platform.catalog.events import Events
from okavango.platform.catalog.files import Files
from okavango.platform.catalog.jobs import Jobs
from okavango.platform.config import Settings


class Catalog(Assets, Adapters, Jobs, Events, Files):
    """One database. Safe to share between threads; each process opens its own.

    Args and errors of opening: okavango.platform.catalog.transactions.Transactions.
    """


def open_catalog(settings: Settings) -> Catalog:
    """The catalog that the settings name."""
    return Catalog(settings.database)
