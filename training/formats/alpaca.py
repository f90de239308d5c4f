"""Alpaca's rows: an instruction, perhaps an input, and the output.

    {"instruction": "Name the colour.", "input": "grass", "output": "green", "system": "Be brief.",
     "history": [["Hello", "Hello!"]], "image": "images/1.png"}

The input follows the instruction on a line of its own. Media go where marks are, and without any before the
row's first question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from okavango.modalities.content import Fault, kind_of
from okavango.training.formats.normal import MEDIA_KEYS, Draft, Normal, row_keys

KEYS = ("instruction", "input", "output", "system", "history", *MEDIA_KEYS, "id")


def alpaca(row: Mapping[str, Any]) -> Normal:
    draft = Draft(row, "instruction")
    draft.normal.own += row_keys(row, KEYS)
    missing = [key for key in ("instruction", "output") if row.get(key) is None]
    if missing:
        return Normal(own=[*draft.normal.own, *(Fault(key, "is missing") for key in missing)])
    if row.get("system"):
        _say(draft, "system", row["system"], "system")
    _history(row.get("history"), draft)
    _say(draft, "user", _question(row, draft), "instruction")
    _say(draft, "assistant", row["output"], "output")
    draft.lead()
    return draft.done()


def _question(row: Mapping[str, Any], draft: Draft) -> Any:
    instruction, given = row["instruction"], row.get("input")
    if given is not None and not isinstance(given, str):
        draft.normal.own.append(Fault("input", f"must be a string, not {kind_of(given)}"))
        return instruction
    return f"{instruction}\n{given}" if given and isinstance(instruction, str) else instruction


def _history(history: Any, draft: Draft) -> None:
    if history is None:
        return
    if not isinstance(history, list):
        draft.normal.own.append(Fault("history", f"must be a list, not {kind_of(history)}"))
        return
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            draft.normal.own.append(Fault(f"history[{i}]", "must be a list of a question and its answer"))
            continue
        for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            _say(draft, role, text, f"history[{i}][{side}]")


def _say(draft: Draft, role: str, text: Any, at: str) -> None:
    draft.say(role, text, at=at, role_at=at, text_at=at)
