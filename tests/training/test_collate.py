from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_fixtures import text_row, write_pictures, write_rows

from okavango.modalities.content import Message, Text
from okavango.modalities.prompt import Renderer
from okavango.platform.errors import DataError
from okavango.training.collate import Row, collate, render_row, render_rows
from okavango.training.dataset import Example, open_dataset


def conversation(*turns: str) -> Example:
    roles = ("user", "assistant")
    return Example(tuple(Message(roles[i % 2], (Text(turn),)) for i, turn in enumerate(turns)), 1)


def no_features(modality: str, digest: str) -> torch.Tensor:
    raise AssertionError(digest)


def text_of(renderer: Renderer, tokens: list[int]) -> str:
    return str(renderer.tokenizer.decode(tokens))


def predicted(renderer: Renderer, rows: list[Row]) -> str:
    return text_of(renderer, collate(rows, no_features).labels.tolist())


def test_the_loss_is_on_the_assistants_words_only(tiny_renderer: Renderer) -> None:
    row = render_row(conversation("hello", "good day"), tiny_renderer, None)
    assert predicted(tiny_renderer, [row]) == "good day<|im_end|>"


def test_every_turn_of_the_assistant_counts(tiny_renderer: Renderer) -> None:
    row = render_row(conversation("one", "two", "three", "four"), tiny_renderer, None)
    assert predicted(tiny_renderer, [row]) == "two<|im_end|>four<|im_end|>"


def test_turns_that_are_not_learned_are_read_alone(tmp_path: Path, tiny_renderer: Renderer) -> None:
    row = text_row("one", "two", "three", "four", "five", "six")
    for weighed in (1, 5):
        row["messages"][weighed]["weight"] = 0
    dataset = open_dataset(write_rows(tmp_path / "rows.jsonl", [row]))
    (rendered,) = render_rows(dataset, tiny_renderer, None, 512)
    assert predicted(tiny_renderer, [rendered]) == "four<|im_end|>"
    fed = text_of(tiny_renderer, rendered.tokens.tolist())
    assert "two" in fed
    assert "five" not in fed


def test_the_last_turn_alone_can_be_learned(tmp_path: Path, tiny_renderer: Renderer) -> None:
    weighed = text_row("one", "two", "three", "four")
    weighed["messages"][3]["weight"] = 0
    rows = [text_row("one", "two", "three", "four"), weighed]
    dataset = open_dataset(write_rows(tmp_path / "rows.jsonl", rows))
    found = render_rows(dataset, tiny_renderer, None, 512, last_turn=True)
    assert [predicted(tiny_renderer, [row]) for row in found] == ["four<|im_end|>", "two<|im_end|>"]


def test_what_comes_after_the_last_answer_is_left_out(tiny_renderer: Renderer) -> None:
    short = render_row(conversation("one", "two"), tiny_renderer, None)
    longer = render_row(conversation("one", "two", "never answered"), tiny_renderer, None)
    assert short.tokens.tolist() == longer.tokens.tolist()
    assert text_of(tiny_renderer, short.tokens[-1:].tolist()) == "<|im_end|>"


def test_a_system_prompt_leads_rows_that_have_none(tiny_renderer: Renderer) -> None:
    row = render_row(conversation("one", "two"), tiny_renderer, "Be brief.")
    assert "system\nBe brief." in text_of(tiny_renderer, row.tokens.tolist())
    own = Example((Message("system", (Text("Sing."),)), *conversation("one", "two").messages), 1)
    shown = text_of(tiny_renderer, render_row(own, tiny_renderer, "Be brief.").tokens.tolist())
    assert "Sing." in shown
    assert "Be brief." not in shown


def test_rows_keep_their_tokens_and_predictions_when_packed(tiny_renderer: Renderer) -> None:
    turns = [("hello there", "a"), ("hello", "longer answer", "more", "b"), ("hellish", "cc")]
    rows = [render_row(conversation(*each), tiny_renderer, None) for each in turns]
    batch = collate(rows, no_features)
    shared, length = batch.layout.shared, batch.layout.length
    assert shared == len(tiny_renderer.tokenizer("<|im_start|>user\nhell")["input_ids"])
    assert len(batch.tokens) == shared + 3 * length
    position = batch.layout.positions(torch.device("cpu"))[0]
    found = 0
    for i, row in enumerate(rows):
        start = shared + i * length
        whole = torch.cat([batch.tokens[:shared], batch.tokens[start : start + row.length - shared]])
        assert whole.tolist() == row.tokens[:-1].tolist()
        assert position[start : start + length].tolist() == list(range(shared, shared + length))
        for at in np.flatnonzero(row.loss):
            where = batch.predicting[found]
            assert position[where] == at - 1
            assert start <= where < start + length
            assert batch.labels[found] == row.tokens[at]
            found += 1
    assert found == len(batch.labels)


def test_a_row_alone_shares_nothing(tiny_renderer: Renderer) -> None:
    batch = collate([render_row(conversation("x", "y"), tiny_renderer, None)], no_features)
    assert batch.layout.shared == 0


def test_rows_that_are_all_the_same_still_predict_their_own_answers(tiny_renderer: Renderer) -> None:
    row = render_row(conversation("x", "yes"), tiny_renderer, None)
    batch = collate([row, row], no_features)
    assert text_of(tiny_renderer, batch.labels.tolist()) == "yes<|im_end|>yes<|im_end|>"
    assert len(set(batch.predicting.tolist())) == len(batch.labels)


def test_pictures_take_their_places_in_the_pack(tmp_path: Path, tiny_renderer: Renderer) -> None:
    rows = render_rows(open_dataset(write_pictures(tmp_path)), tiny_renderer, None, 512)[:3]
    asked: list[str] = []

    def load(modality: str, digest: str) -> torch.Tensor:
        asked.append(digest)
        return torch.full((1, 4, 32), float(len(asked)))

    batch = collate(rows, load)
    assert asked == [digest for row in rows for digest in row.media]
    assert batch.media.keys() == {"image"}
    assert [features[0, 0, 0].item() for features in batch.media["image"]] == [1.0, 2.0, 3.0]
    # no picture is shared, although all rows have theirs at the same place
    assert batch.layout.shared == rows[0].spans[0].start
    assert [span.start for span in batch.spans] == [
        batch.layout.shared + i * batch.layout.length for i in range(3)
    ]


def test_rows_that_are_too_long_are_named_and_nothing_is_cut(tmp_path: Path, tiny_renderer: Renderer) -> None:
    rows = [text_row("a", "b"), text_row("a" * 90, "b"), text_row("a", "b" * 95)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as raised:
        render_rows(open_dataset(path), tiny_renderer, None, max_length=80)
    assert [fault.split(": ")[0] for fault in raised.value.faults] == [f"{path}:2", f"{path}:3"]
    assert "tokens, over the limit of 80" in raised.value.faults[0]
