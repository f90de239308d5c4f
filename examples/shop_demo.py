"""Two shops, one model: product photos get titles in the house style of whichever shop asks.

    python examples/shop_demo.py                  everything; some twenty minutes on two CPU cores
    python examples/shop_demo.py --steps 40       shorter training runs, and humbler titles
    python examples/shop_demo.py --base shop      on a base of your own, which must see
    python examples/shop_demo.py --stop           stop the server that an earlier run left

Trains an adapter a shop on the same photos, and for comparison one by the recipe that is commonly used (LoRA
alone, on q_proj and v_proj: r = 16, alpha = 32, dropout 0.1); serves them; asks about photos that were not
trained on, the base with four examples in its prompt, too. Needs Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_server import about, ask, console, is_trained, run, start_server, stop_server
from openai import OpenAI
from rich.table import Table
from sacrebleu.metrics import BLEU

ROOT = Path(__file__).resolve().parent.parent
STYLES = ("ledger", "chatty")
COMMON = [
    "--rank",
    "16",
    "--alpha",
    "32",
    "--dropout",
    "0.1",
    "--target",
    "q_proj",
    "--target",
    "v_proj",
    "--no-head",
]
PHOTOS = 2_000
ASKED_AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """A photo, what is asked about it, and its title in one style."""

    photo: Path
    text: str
    title: str

    def turns(self) -> list[dict[str, Any]]:
        return [about(self.photo, self.text), {"role": "assistant", "content": self.title}]


@dataclass(frozen=True)
class Way:
    """How a title is made: by which model, after which examples."""

    name: str
    model: str
    before: tuple[dict[str, Any], ...] = ()


def main() -> None:
    options = parse_options()
    stop_server()
    if options.stop:
        return
    if options.base == "starter":
        run("base", "build", "starter")
    source = ["--source", str(options.source)] if options.source else []
    for style in STYLES:
        folder = options.data / style
        run("data", "fashion", str(folder), "--style", style, "--limit", str(options.photos), *source)
        train(f"shop-{style}", folder, options)
    train("shop-ledger-common", options.data / "ledger", options, *COMMON)
    address = start_server(options.base)
    client = OpenAI(base_url=f"{address}/v1", api_key="none needed on loopback")
    show_switch(client, options.data)
    for style in STYLES:
        show_scores(client, style, options)
    console.print(f"\nThe server is still running. Studio: [bold]{address}/studio[/]  API: {address}/v1")
    console.print("Stop it with: python examples/shop_demo.py --stop")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="of each training run (default: 250)")
    parser.add_argument("--retrain", action="store_true", help="train new versions even if there are some")
    parser.add_argument("--score", type=int, default=300, help="held-out photos to score (default: 300)")
    parser.add_argument("--photos", type=int, default=PHOTOS, help=f"of the dataset (default: {PHOTOS:,})")
    parser.add_argument("--examples", type=int, default=4, help="in the base's prompt (default: 4)")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "shops", help="where rows are written")
    parser.add_argument("--source", type=Path, help="where the photos lie, if not where Debian puts them")
    parser.add_argument("--stop", action="store_true", help="only stop the server of an earlier run")
    return parser.parse_args()


def train(adapter: str, folder: Path, options: argparse.Namespace, *more: str) -> None:
    if is_trained(adapter) and not options.retrain:
        console.print(f"\nThe adapter {adapter!r} is trained already (--retrain makes a new version).")
        return
    config = options.data / "recipe.toml"
    # photos of 28 pixels, taken alike: altered views of them would teach nothing
    config.write_text("views = 0\ncompare = false\neval_rows = 50\n")
    files = ["--data", str(folder / "train.jsonl"), "--eval", str(folder / "validation.jsonl")]
    settings = ["--config", str(config), "--steps", str(options.steps), "--name", adapter]
    run("train", "--base", options.base, *files, *settings, *more)


def rows_of(folder: Path, split: str) -> list[Row]:
    found = []
    for line in (folder / f"{split}.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        parts = {part["type"]: part for part in user["content"]}
        photo = folder / parts["image_url"]["image_url"]["url"]
        found.append(Row(photo, parts["text"]["text"], assistant["content"]))
    return found


def show_switch(client: OpenAI, data: Path) -> None:
    """The same photos under both adapters."""
    table = Table(title="One photo, two shops", show_lines=True)
    for column in ("photo", *(f"shop-{style}" for style in STYLES)):
        table.add_column(column, overflow="fold")
    for row in rows_of(data / STYLES[0], "test")[:4]:
        titles = [ask(client, f"shop-{style}", [about(row.photo, row.text)]) for style in STYLES]
        table.add_row(row.photo.name, *titles)
    console.print(table)


def show_scores(client: OpenAI, style: str, options: argparse.Namespace) -> None:
    """BLEU-4 of titles in a shop's style, over the same held-out photos."""
    folder = options.data / style
    examples = [turn for row in rows_of(folder, "train")[: options.examples] for turn in row.turns()]
    ways = [
        Way("the base", options.base),
        Way(f"the base, {options.examples} examples in its prompt", options.base, tuple(examples)),
        *([Way("an adapter by the common recipe", "shop-ledger-common")] if style == "ledger" else []),
        Way("the shop's adapter", f"shop-{style}"),
    ]
    held_out = rows_of(folder, "test")[: options.score]
    titles = [row.title for row in held_out]
    table = Table(title=f"{style}: {len(held_out)} held-out photos, asked through the API")
    for column in ("titles by", "BLEU-4", "exact"):
        table.add_column(column)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for way in ways:
            asked = [[*way.before, about(row.photo, row.text)] for row in held_out]
            answers = list(pool.map(lambda each, way=way: ask(client, way.model, each), asked))
            score = BLEU(effective_order=True).corpus_score(answers, [titles]).score
            exact = sum(answer == title for answer, title in zip(answers, titles, strict=True))
            table.add_row(way.name, f"{score:.1f}", f"{exact} of {len(held_out)}")
    console.print(table)


if __name__ == "__main__":
    main()
