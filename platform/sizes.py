"""Sizes as people write them."""

from __future__ import annotations

import re

from okavango.platform.errors import ConfigError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str, where: str) -> int:
    """ "4GiB", "512M" or a number of bytes → bytes; units are powers of 1024.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size", where=where, remedy="write 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
