"""DINOv2 from an ONNX export with Hugging Face's names → the tensors of timm's tower inside open_clip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

from okavango.modalities.onnx import Graph
from okavango.platform.errors import BindError

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_RENAMED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_RENAMED_IN_LAYER = (
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)


def tower_tensors(graph: Graph) -> dict[str, Tensor]:
    """The state of open_clip's TimmModel around vit_*_patch14_dinov2, at the export's own picture size.

    Raises:
        BindError: a part of the backbone is not where such an export has it.
    """
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in (graph.weights | dict(_linear_weights(graph))).items()
        if name.startswith("backbone.")
    }
    tensors = dict(_timm_tensors(backbone))
    tensors["pos_embed"] = torch.cat([_anonymous(graph, "Concat"), _anonymous(graph, "Reshape")], dim=1)
    return {f"trunk.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _linear_weights(graph: Graph) -> Iterator[tuple[str, Tensor]]:
    """The exporter transposes a linear layer's weight and drops its name, but its bias keeps one: y = x·W + b
    is a MatMul whose output an Add takes together with the bias."""
    products = {
        node.outputs[0]: graph.weights[node.inputs[1]]
        for node in graph.nodes
        if node.op == "MatMul" and node.inputs[1] in graph.weights
    }
    for node in graph.nodes:
        for bias, product in permutations(node.inputs, 2) if node.op == "Add" else ():
            if bias.endswith(".bias") and product in products:
                yield bias.removesuffix("bias") + "weight", products[product].T


def _timm_tensors(backbone: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in backbone.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            yield _RENAMED.get(name, name), tensor
        elif "attention.attention.query" in name:
            parts = [_part(backbone, name.replace("query", part)) for part in ("query", "key", "value")]
            yield f"blocks.{layer[1]}.attn.qkv.{name.rpartition('.')[2]}", torch.cat(parts)
        elif "attention.attention." not in name:
            yield f"blocks.{layer[1]}.{_in_layer(layer[2])}", tensor


def _in_layer(name: str) -> str:
    for old, new in _RENAMED_IN_LAYER:
        name = name.replace(old, new)
    return name


def _part(backbone: dict[str, Tensor], name: str) -> Tensor:
    if name not in backbone:
        raise BindError("the ONNX export lacks this tensor", where=f"backbone.{name}")
    return backbone[name]


def _anonymous(graph: Graph, op: str) -> Tensor:
    """The one unnamed weight that an `op` takes: the class and the patch part of the position embedding."""
    found = {
        name
        for node in graph.nodes
        for name in node.inputs
        if node.op == op and name in graph.weights and name.startswith("onnx::")
    }
    if len(found) != 1:
        raise BindError(f"{len(found)} unnamed weights go into a {op}, expected one", where="ONNX export")
    return graph.weights[found.pop()]
