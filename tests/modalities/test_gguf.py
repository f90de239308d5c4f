"""A GGUF file as llama.cpp's converter would write it for the tiny decoder, and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from okavango.modalities.base import tree_digest
from okavango.modalities.gguf import convert_gguf
from okavango.modalities.tiny import CHAT_TEMPLATE, SPECIAL, write_tiny_decoder
from okavango.platform.errors import ConfigError, UnsupportedError

HEADS, KV_HEADS = 4, 2
MERGED = {"Ā": "qz", "ā": "zq"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps the two halves of a rotary pair side by side."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """The decoder in `folder`, unquantised, whose tokenizer has two merges in place of two control bytes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [MERGED.get(token, token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["q z", "z q"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        count = next((count for part, count in heads.items() if part in name), None)
        writer.add_tensor(gguf_name(name), (interleaved(weight, count) if count else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "decoder"
    write_tiny_decoder(folder)
    return folder


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    path = source.parent / "tiny.gguf"
    write_gguf(path, source)
    return path


@pytest.fixture(scope="module")
def converted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "decoder"
    convert_gguf(file, folder)
    return folder


def test_every_weight_comes_back(source: Path, converted: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_result_is_an_ordinary_decoder(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 512
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)


def test_the_tokenizer_comes_along(source: Path, converted: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(source)
    text = "Grüße, 世界 🐘\n\t  <|im_end|>"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.tokenize("qz zq") == ["qz", "Ġ", "zq"]
    assert theirs.chat_template == CHAT_TEMPLATE
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.model_max_length == 512


def test_the_digest_hangs_neither_on_the_place_nor_on_the_library_s_version(
    file: Path, converted: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "other-name.gguf"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    convert_gguf(moved, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(converted)
    assert "transformers_version" not in "".join(path.read_text() for path in converted.glob("*config.json"))


def test_conversion_is_quiet(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert_gguf(file, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")


def test_a_file_without_a_chat_template_is_refused(source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", source, chat_template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        convert_gguf(tmp_path / "plain.gguf", tmp_path / "decoder")


@pytest.mark.parametrize("size", [0, 3, 500, 200_000])
def test_a_torn_file_is_refused(file: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "torn.gguf").write_bytes(file.read_bytes()[:size])
    with pytest.raises(UnsupportedError, match=r"torn\.gguf"):
        convert_gguf(tmp_path / "torn.gguf", tmp_path / "decoder")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "odd.gguf", "not-a-known-one")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"odd\.gguf"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "decoder")
