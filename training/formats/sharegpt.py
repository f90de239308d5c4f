"""Conversations of `from` and `value`: ShareGPT's rows, and LLaVA's, which hold one picture under `image`.

{"conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "a dog"}],
 "system": "Be brief.", "images": ["images/1.png"]}
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from okavango.modalities.content import Fault, kind_of, unknown_keys
from okavango.training.formats.normal import Draft, Normal, row_keys

SHAREGPT_KEYS = ("conversations", "system", "images", "audios", "id")
LLAVA_KEYS = ("id", "image", "conversations")
_TURN_KEYS = ("from", "value")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def sharegpt(row: Mapping[str, Any]) -> Normal:
    return _conversation(row, SHAREGPT_KEYS)


def llava(row: Mapping[str, Any]) -> Normal:
    return _conversation(row, LLAVA_KEYS)


def _conversation(row: Mapping[str, Any], known: tuple[str, ...]) -> Normal:
    draft = Draft(row, "conversations")
    draft.normal.own += row_keys(row, known)
    turns = row.get("conversations")
    if not isinstance(turns, list):
        text = f"must be a list, not {kind_of(turns)}" if "conversations" in row else "is missing"
        return Normal(own=[*draft.normal.own, Fault("conversations", text)])
    if row.get("system"):
        draft.say("system", row["system"], at="system", role_at="system", text_at="system")
    for i, turn in enumerate(turns):
        _turn(turn, f"conversations[{i}]", draft)
    return draft.done()


def _turn(turn: Any, at: str, draft: Draft) -> None:
    name = f"messages[{len(draft.normal.messages)}]"
    if not isinstance(turn, Mapping):
        draft.normal.places[name] = at
        draft.normal.messages.append(turn)  # the parser says what it is
        return
    draft.normal.own += unknown_keys(turn, _TURN_KEYS, at)
    speaker = turn.get("from")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        shown = f"is {reprlib.repr(speaker)}; one of {', '.join(_ROLES)} is expected"
        draft.fault(f"{name}.role", shown if "from" in turn else "is missing")
    if "value" in turn:
        draft.say(role, turn["value"], at=at, role_at=f"{at}.from", text_at=f"{at}.value")
        return
    draft.normal.places |= {name: at, f"{name}.role": f"{at}.from", f"{name}.content": f"{at}.value"}
    draft.normal.messages.append({"role": role})  # and that it has no content
