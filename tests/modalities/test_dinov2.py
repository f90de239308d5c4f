from dataclasses import replace

import pytest
import torch
from torch import Tensor

from okavango.modalities.dinov2 import tower_tensors
from okavango.modalities.onnx import Graph, Node
from okavango.platform.errors import BindError

WIDTH = 4
LAYER = "backbone.encoder.layer.0."
LINEAR = {  # Hugging Face's name: output width
    "attention.attention.query": WIDTH,
    "attention.attention.key": WIDTH,
    "attention.attention.value": WIDTH,
    "attention.output.dense": WIDTH,
    "mlp.fc1": 8,
    "mlp.fc2": WIDTH,
}
PLAIN = ("norm1.weight", "norm1.bias", "layer_scale1.lambda1", "norm2.weight", "layer_scale2.lambda1")


def linear(name: str) -> tuple[Tensor, Tensor]:
    """(weight, bias) of one layer, different for every name."""
    generator = torch.Generator().manual_seed(sorted(LINEAR).index(name))
    inputs = 8 if name == "mlp.fc2" else WIDTH
    return torch.randn(LINEAR[name], inputs, generator=generator), torch.randn(
        LINEAR[name], generator=generator
    )


@pytest.fixture
def graph() -> Graph:
    """An export with one layer, as torch's exporter leaves it: linear weights transposed and nameless."""
    weights = {
        "backbone.embeddings.cls_token": torch.ones(1, 1, WIDTH),
        "backbone.embeddings.patch_embeddings.projection.weight": torch.ones(WIDTH, 3, 2, 2),
        "backbone.layernorm.bias": torch.ones(WIDTH),
        "onnx::Concat_1": torch.full((1, 1, WIDTH), 7.0),
        "onnx::Reshape_2": torch.full((1, 9, WIDTH), 9.0),
        "decoder.final_conv.bias": torch.ones(1),
        **{LAYER + name: torch.randn(WIDTH) for name in PLAIN},
    }
    nodes = [
        Node("Concat", ("class", "onnx::Concat_1"), ("c",)),
        Node("Reshape", ("onnx::Reshape_2", "s"), ("r",)),
    ]
    for i, name in enumerate(LINEAR):
        weight, bias = linear(name)
        weights |= {f"onnx::MatMul_{i}": weight.T.contiguous(), f"{LAYER}{name}.bias": bias}
        inputs = (f"{LAYER}{name}.bias", f"y{i}")
        nodes.append(Node("MatMul", ("x", f"onnx::MatMul_{i}"), (f"y{i}",)))
        nodes.append(Node("Add", inputs if i % 2 else inputs[::-1], (f"z{i}",)))
    nodes.append(Node("MatMul", ("z0", "z1"), ("scores",)))
    return Graph(weights, tuple(nodes))


def test_linear_weights_get_their_names_and_orientation_back(graph: Graph) -> None:
    found = tower_tensors(graph)
    for ours, theirs in {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }.items():
        weight, bias = linear(theirs)
        assert torch.equal(found[f"trunk.blocks.0.{ours}.weight"], weight)
        assert torch.equal(found[f"trunk.blocks.0.{ours}.bias"], bias)


def test_query_key_and_value_are_fused_in_that_order(graph: Graph) -> None:
    found = tower_tensors(graph)
    parts = [linear(f"attention.attention.{part}") for part in ("query", "key", "value")]
    assert torch.equal(found["trunk.blocks.0.attn.qkv.weight"], torch.cat([weight for weight, _ in parts]))
    assert torch.equal(found["trunk.blocks.0.attn.qkv.bias"], torch.cat([bias for _, bias in parts]))


def test_the_class_position_comes_before_the_patches(graph: Graph) -> None:
    position = tower_tensors(graph)["trunk.pos_embed"]
    assert position.shape == (1, 10, WIDTH)
    assert position[0, :, 0].tolist() == [7.0] + [9.0] * 9


def test_only_the_backbone_is_taken_and_all_of_it(graph: Graph) -> None:
    names = {name.removeprefix("trunk.") for name in tower_tensors(graph)}
    in_block = {"norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "ls2.gamma"}
    in_block |= {
        f"{layer}.{kind}"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    outside = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias"}
    assert names == outside | {f"blocks.0.{name}" for name in in_block}


def test_a_projection_without_its_key_is_a_clear_error(graph: Graph) -> None:
    weights = {name: value for name, value in graph.weights.items() if "attention.key" not in name}
    with pytest.raises(BindError, match=r"layer\.0\.attention\.attention\.key\.bias"):
        tower_tensors(replace(graph, weights=weights))


def test_an_export_without_positions_is_a_clear_error(graph: Graph) -> None:
    with pytest.raises(BindError, match="0 unnamed weights go into a Reshape"):
        tower_tensors(replace(graph, nodes=tuple(node for node in graph.nodes if node.op != "Reshape")))
