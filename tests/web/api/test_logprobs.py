"""Tokens as bytes and as text, of the kinds of tokenizers that there are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from okavango.modalities.tiny import byte_tokenizer
from okavango.serving.types import Chosen
from okavango.web.api.logprobs import LegacyLogprobs, TokenText, chat_logprobs


@pytest.fixture(scope="module")
def byte_level() -> TokenText:
    return TokenText(byte_tokenizer())


def sentencepiece() -> PreTrainedTokenizerFast:
    """Of the kind that Llama and Gemma have: ▁ for a space, and bytes for what has no piece."""
    pieces = ["<unk>", "\u2581dog", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize("text", ["hello", " a\n\t", "é🐶", "\x00\x7f\xad"])
def test_bytes_of_all_tokens_make_the_text(byte_level: TokenText, text: str) -> None:
    assert b"".join(byte_level.raw(token) for token in ids(text)).decode() == text


def test_a_part_of_a_character_is_shown_as_bytes(byte_level: TokenText) -> None:
    assert [byte_level.text(token) for token in ids("aé")] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


def test_a_special_token_has_its_name(byte_level: TokenText) -> None:
    tokenizer = byte_tokenizer()
    assert byte_level.text(tokenizer.eos_token_id) == tokenizer.eos_token  # type: ignore[arg-type]


def test_sentencepiece_has_spaces_and_bytes() -> None:
    tokens = TokenText(sentencepiece())
    assert [tokens.raw(token) for token in (1, 2, 3 + 0xF0)] == [b" dog", b"s", b"\xf0"]
    assert tokens.text(3 + 0xF0) == "bytes:\\xf0"


def test_a_row_without_a_token_is_nothing(byte_level: TokenText) -> None:
    assert byte_level.raw(100_000) == b""


def test_chats_shape(byte_level: TokenText) -> None:
    a, b = ids("ab")
    found = chat_logprobs([Chosen(a, -0.5, ((b, -0.25), (a, -0.5)))], byte_level)
    assert found == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.25, "bytes": [98]},
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                ],
            }
        ],
        "refusal": None,
    }


def test_the_older_shape_counts_whole_characters_over_all_pieces(byte_level: TokenText) -> None:
    legacy = LegacyLogprobs(byte_level, offset=2)
    chosen = [Chosen(token, -1.0, ((ids("z")[0], -0.5),)) for token in ids("éa")]
    first, second = legacy.shape(chosen[:1]), legacy.shape(chosen[1:])
    assert first["text_offset"] + second["text_offset"] == [2, 2, 3]
    assert second["tokens"] == ["bytes:\\xa9", "a"]
    assert second["token_logprobs"] == [-1.0, -1.0]
    assert second["top_logprobs"][1] == {"z": -0.5, "a": -1.0}
