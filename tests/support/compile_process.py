"""Compiles kernels for a Hopper GPU, wherever it runs: Triton's interpreter is less strict than its compiler.

Started as a process of its own, for the interpreter's is told at import. Prints the name of every kernel that
it compiled; fails where one does not compile.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from okavango.modalities.lora import LoraWeights
from okavango.serving.cuda.arena import Arena, Group
from okavango.serving.cuda.kernels import decode, lora, prefill

HOPPER = GPUTarget("cuda", 90, 32)
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
    options = {name: given.pop(name) for name in _OPTIONS if name in given}
    values = dict(zip(kernel.arg_names, args, strict=False)) | given
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    fixed |= {name for name, value in values.items() if isinstance(value, int) and value == 1}
    signature = {
        name: "constexpr" if name in fixed else mangle_type(values[name]) for name in kernel.arg_names
    }
    constants = {(kernel.arg_names.index(name),): values[name] for name in fixed}
    triton.compile(ASTSource(kernel, signature, constants), target=HOPPER, options=options)
    print(kernel.fn.__name__, flush=True)


def compute(dtype: torch.dtype, tokens: int) -> None:
    heads, kv_heads, width, block = 8, 2, 128, 16
    query, out = (
        torch.zeros(heads, tokens, width, dtype=dtype),
        torch.zeros(tokens, heads, width, dtype=dtype),
    )
    key = torch.zeros(kv_heads, tokens, width, dtype=dtype)
    cache = torch.zeros(kv_heads, 4, block, width, dtype=dtype)
    table = torch.zeros(tokens, dtype=torch.int32)
    cpu = torch.device("cpu")
    decode.attend_decode(out, query, key, key, cache, cache, (table,) * 4, 0.1, 100)
    size = prefill.tile_tokens(dtype == torch.float32, width, heads // kv_heads)
    prefill.attend_prefill(out, query, key, key, cache, cache, (table,) * 7, size, 0.1, 100)
    arena = Arena([Group(("a", "b", "c"), 512, (512, 256, 256))], 2, 32, dtype, cpu)
    arena.write(1, arena.pack(LoraWeights({"a": (torch.zeros(8, 512), torch.zeros(8, 512))}, 8)))
    factors = arena.factors(torch.zeros(1, dtype=torch.int64), (512, 256, 256))
    for height in (16, 64):
        tiles = lora.Tiles(table, table, table, height)
        lora.add_lora(
            torch.zeros(tokens, 1024, dtype=dtype), torch.zeros(tokens, 512, dtype=dtype), factors, tiles
        )


def main() -> None:
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(lora, "can_overlap", lambda device: True),
        patch.object(decode, "can_overlap", lambda device: True),
    ):
        compute(torch.bfloat16, 2)  # few, so that sequences are split
        compute(torch.float32, 64)


if __name__ == "__main__":
    main()
