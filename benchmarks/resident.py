"""How much memory an engine's process takes under a workload. run.py starts it as a process of its own.

Prints {"loaded": …, "peak": …, "after": …}: resident bytes before the first request, at most, and at the end.
On Linux also "anonymous_loaded" and "anonymous_after": what of them the process has written. The rest are
pages of files, libraries' above all, which processes share and the system may drop.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from comparison import Work
from ours import Bundles, Ours, engine_options

from okavango.modalities.base import read_base
from okavango.modalities.build import quiet_transformers
from okavango.serving.engine import Engine

STATUS = Path("/proc/self/status")


def main() -> None:
    asked = json.loads(sys.argv[1])
    base, work = read_base(Path(asked["base"])), Work(**asked["work"])
    bundles = Bundles([Path(folder) for folder in asked["bundles"]])
    with quiet_transformers():
        engine = Engine(base, bundles, engine_options(**asked["options"]))
    engine.start()
    found = measure("loaded")
    ours = Ours(engine)
    for seed, refs in (("base", []), ("mixed", bundles.refs)):
        ours.ask(work.prompts(seed, work.requests, ours.vocabulary), refs, work.answer)
    found |= measure("after")
    engine.stop()
    print(json.dumps({**found, "peak": resident("VmHWM")}))


def measure(when: str) -> dict[str, int]:
    found = {when: resident("VmRSS")}
    return found | {f"anonymous_{when}": resident("RssAnon")} if STATUS.is_file() else found


def resident(name: str) -> int:
    """Bytes of this process alone, without its children. Linux keeps them by name; elsewhere only the peak is
    known, which on Linux would be the parent's if that was more."""
    if not STATUS.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
