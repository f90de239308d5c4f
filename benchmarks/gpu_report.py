"""What was measured on a GPU, as Markdown. Plain Python."""

from __future__ import annotations

from typing import Any

from report import describe_machine, table

Found = dict[str, Any]


def markdown(found: Found) -> str:
    parts = [
        "# On a GPU, beside the memory's limit and transformers",
        "Written by `make bench-gpu`; do not edit.",
        describe_machine(found["machine"], found["gpu"]),
        _ceilings(found["ceilings"]),
    ]
    if found.get("checked"):
        parts.append(f"Correctness first: {found['checked']}.")
    for name, shape in found.get("shapes", {}).items():
        parts += _shape(name, shape, found.get("peers", {}).get(name, {}))
    return "\n\n".join(parts) + "\n"


def tera(seconds: float, parameters: int, layers: int, width: int, count: int, length: int) -> float:
    """TFLOP/s of prompts: 2 × parameters × tokens, and attention's 4 × layers × width × tokens² / 2 each."""
    work = 2 * parameters * count * length + count * 4 * layers * width * length**2 / 2
    return work / seconds / 1e12


def _ceilings(ceilings: dict[str, float]) -> str:
    return (
        f"A copy moves {ceilings['copy'] / 1e12:.2f} TB/s, read and written; products of bfloat16 run at "
        f"{ceilings['products'] / 1e12:.0f} TFLOP/s; the host sends {ceilings['from_host'] / 1e9:.0f} GB/s."
    )


def _shape(name: str, shape: Found, peers: Found) -> list[str]:
    adapters = shape["adapters"]
    parts = [
        f"## {name}, bfloat16, {shape['context']} positions",
        "Milliseconds between a stream's tokens while the whole batch generates, as a client sees it; in "
        "brackets what of it the GPU's own work takes. The limit is the time in which weights, keys, values "
        f"and adapters can be read. Rank {shape['rank']} on every linear layer; of adapters there are "
        f"{adapters}, so a larger batch has several rows each.",
        table(["batch", "base", "of the limit", "own adapters", "of the limit", "to base"], _steps(shape)),
    ]
    if peers.get("continuous"):
        rows = [_continuous(batch, shape, each) for batch, each in peers["continuous"].items() if each]
        parts += [
            "transformers' continuous batching, on the base:",
            table(["batch", "ms", "×", "with"], rows),
        ]
    if peers.get("peft"):
        seconds, batch = peers["peft"]["seconds"], str(peers["peft"]["adapters"])
        ours = shape["steps"][batch]["own"]["median"]
        parts.append(
            f"PEFT's `adapter_names`, {batch} rows with an adapter each: {seconds * 1000:.0f} ms a step, "
            f"{seconds / ours:.0f} × ours."
        )
    if shape.get("prefill"):
        head = ["prompts", "base, ms", "TFLOP/s", "8 adapters, ms", "to base"]
        parts += ["Prompts, from the first step to the last one's first token:", table(head, _prefill(shape))]
    if shape.get("swap"):
        swap = shape["swap"]
        parts.append(
            f"An adapter is copied into a slot in {swap['copy'] * 1000:.2f} ms. First token of a short "
            f"prompt: {swap['base'] * 1000:.0f} ms on the base, {swap['held'] * 1000:.0f} under an adapter "
            f"on the host, {swap['file'] * 1000:.0f} under one that is read from a file first."
        )
    return parts


def _steps(shape: Found) -> list[list[str]]:
    rows = []
    for batch, each in shape["steps"].items():
        base, own = each["base"], each["own"]
        rows.append(
            [
                batch,
                _ms(base),
                f"{each['floor']['base'] / base['median']:.0%}",
                _ms(own),
                f"{each['floor']['own'] / own['median']:.0%}",
                f"{own['median'] / base['median']:.2f}",
            ]
        )
    return rows


def _ms(steps: Found) -> str:
    graph = "–" if steps["graph"] is None else f"{steps['graph'] * 1000:.2f}"
    return f"{steps['median'] * 1000:.2f} ({graph})"


def _continuous(batch: str, shape: Found, peer: Found) -> list[str]:
    ratio = peer["seconds"] / shape["steps"][batch]["base"]["median"]
    return [batch, f"{peer['seconds'] * 1000:.2f}", f"{ratio:.2f}", peer["settings"]]


def _prefill(shape: Found) -> list[list[str]]:
    rows = []
    for each in shape["prefill"]:
        sizes = shape["parameters"], shape["layers"], shape["width"], each["count"], each["length"]
        rows.append(
            [
                f"{each['count']} × {each['length']}",
                f"{each['base'] * 1000:.1f}",
                f"{tera(each['base'], *sizes):.0f}",
                f"{each['adapters'] * 1000:.1f}",
                f"{each['adapters'] / each['base']:.2f}",
            ]
        )
    return rows
