"""How near to a GPU's limits the engine computes, beside transformers' continuous batching and PEFT.

    python benchmarks/gpu.py                      everything: some ten minutes on an H100
    python benchmarks/gpu.py --only smol          one of check, llama, smol, peers

Needs torch, transformers, peft, safetensors, triton, and pytest for the check. Where okavango is not
installed: make typing-links, and PYTHONPATH=.typing. Writes h100.json and h100.md, or what --name says, after
each part, so that a run which is cut short leaves what it has found.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_engine import ADAPTERS, LLAMA, RANK, SMOL, Shape, Side, ceilings
from gpu_peers import continuous, mixed_peft
from gpu_report import Found, markdown
from machine import describe

PACKAGES = ("torch", "triton", "transformers", "peft")
PARTS = ("check", "llama", "smol", "peers")
CONTEXT = 512
PROMPTS = ((8, 512), (1, 4096))
MIXED = 8
PEFT_ADAPTERS = 32
ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu" / "test_cuda_backend.py"


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU on this machine")
    found: Found = {
        "machine": describe(PACKAGES),
        "gpu": torch.cuda.get_device_name(),
        "ceilings": ceilings(),
        "shapes": {},
        "peers": {},
    }
    free()
    for part in options.only:
        print(part, flush=True)
        measure(part, found)
        free()
        write(found, options.out, options.name)
    print(markdown(found))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, in order")
    parser.add_argument("--name", default="h100", help="of the files; default: h100")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    return parser.parse_args()


def measure(part: str, found: Found) -> None:
    if part == "check":
        found["checked"] = check()
    elif part == "peers":
        found["peers"][LLAMA.name] = peers(LLAMA)
    else:
        shape = {"llama": LLAMA, "smol": SMOL}[part]
        with tempfile.TemporaryDirectory() as folder:
            found["shapes"][shape.name] = ours(shape, Path(folder) / "base", found["ceilings"]["copy"])


def check() -> str:
    """The tests that compare with transformers and PEFT. Ends the run where one fails."""
    # without pyproject.toml, whose options are of plugins that a bare GPU machine has not
    paths = f"pythonpath={ROOT / 'tests' / 'support'} {ROOT / 'benchmarks'}"
    config = ["-c", os.devnull, f"--rootdir={ROOT}", "-o", paths]
    flags = ["-q", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *config, *flags, str(TESTS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\nthe GPU computes something else than transformers: nothing is measured")
    return done.stdout.strip().splitlines()[-1].strip("= ")


def ours(shape: Shape, folder: Path, copied: float) -> Found:
    side = Side(shape, folder)
    try:
        fresh, *_ = side.refs
        side.backend.wait()
        side.warm([])
        file = side.first_token(fresh)  # nobody has asked for it before
        side.warm(side.refs)
        steps = {str(batch): steps_of(side, batch, copied) for batch in shape.batches}
        swap = {
            "base": side.first_token(None),
            "held": side.first_token(fresh),
            "file": file,
            "copy": side.swap(),
        }
        prompts = [prefill_of(side, *sizes) for sizes in PROMPTS]
        return {**about(shape, side), "steps": steps, "prefill": prompts, "swap": swap}
    finally:
        side.close()


def about(shape: Shape, side: Side) -> Found:
    parameters = sum(p.numel() for p in side.engine.core.runner.decoder.parameters())
    return {
        "context": CONTEXT,
        "rank": RANK,
        "adapters": ADAPTERS,
        "parameters": parameters,
        "layers": shape.config["num_hidden_layers"],
        "width": shape.config["hidden_size"],
        "graphs": len(side.backend._graphs),
    }


def steps_of(side: Side, batch: int, copied: float) -> Found:
    base, own = side.steps(batch, []), side.steps(batch, side.refs[:batch])
    floor = {"base": side.floor(batch, 0, copied), "own": side.floor(batch, ADAPTERS, copied)}
    return {"base": asdict(base), "own": asdict(own), "floor": floor}


def prefill_of(side: Side, count: int, length: int) -> Found:
    adapters = side.prefill(count, length, side.refs[:MIXED])
    return {"count": count, "length": length, "base": side.prefill(count, length, []), "adapters": adapters}


def peers(shape: Shape) -> Found:
    found: dict[str, Any] = {"continuous": continuous(shape, shape.batches)}
    free()
    found["peft"] = {"adapters": PEFT_ADAPTERS, "seconds": mixed_peft(shape, PEFT_ADAPTERS)}
    return found


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def write(found: Found, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
