"""Whatever JSON a row is, in whatever format it is read: faulted, or readable by training."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from okavango.modalities.content import Limits
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import DataError
from okavango.training.check import check_dataset
from okavango.training.dataset import open_dataset
from okavango.training.formats.detect import FORMATS, NAMES

LIMITS = Limits(media_per_request=3, text_chars=200)

_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just("1.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_SAID = st.text(max_size=4) | st.sampled_from(["<image>", "a\n<image>b", "<audio>", "<image><image>", " "])
_PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _SAID}),
    st.fixed_dictionaries({"type": st.sampled_from(["image", "audio"])}, optional={"image": _JUNK}),
    _JUNK,
)
_TURN = st.one_of(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "system"]) | _JUNK, "value": _SAID | _JUNK}
    ),
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | _JUNK},
        optional={"content": _SAID | st.lists(_PART, max_size=3) | _JUNK, "weight": _JUNK},
    ),
    _JUNK,
)
_MEDIA = st.sampled_from(["1.png", "gone.png", {"bytes": None, "path": "1.png"}]) | _JUNK
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(_TURN, max_size=4) | _JUNK,
    "conversations": st.lists(_TURN, max_size=4) | _JUNK,
    "instruction": _SAID | _JUNK,
    "input": _SAID | _JUNK,
    "output": _SAID | _JUNK,
    "system": _SAID | _JUNK,
    "history": st.lists(st.lists(_SAID | _JUNK, max_size=3), max_size=2) | _JUNK,
    "image": _MEDIA,
    "images": st.lists(_MEDIA, max_size=3) | _JUNK,
    "audio": _MEDIA,
    "id": _JUNK,
    "other": _JUNK,
}
_NEEDED = {name: {key: _VALUES[key] for key in form.needed} for name, form in FORMATS.items()}
_ROW = st.sampled_from(NAMES).flatmap(
    lambda name: st.fixed_dictionaries(
        _NEEDED[name], optional={key: value for key, value in _VALUES.items() if key not in _NEEDED[name]}
    )
)


@pytest.mark.parametrize("form", [None, *NAMES])
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROW, min_size=1, max_size=3))
def test_any_row_is_faulted_or_readable(tmp_path: Path, form: str | None, rows: list[Any]) -> None:
    (tmp_path / "1.png").write_bytes(picture_bytes(1))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_dataset(path, form=form, limits=LIMITS)
    dataset = open_dataset(path, form=form, limits=LIMITS)
    assert dataset.format == report.format
    faulty = {fault.line for fault in report.faults}
    for i in range(len(rows)):
        if i + 1 in faulty:
            with pytest.raises(DataError):
                dataset.row(i)
            continue
        messages = dataset.row(i).messages
        assert messages[-1].text.strip()
        assert len(dataset.names(i)) == sum(len(message.media) for message in messages)
