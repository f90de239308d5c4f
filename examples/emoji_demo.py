"""The main job, end to end: build the starter base, train an adapter on emoji, serve it, ask it.

    make demo                          everything; about fifteen minutes on two CPU cores
    make demo ARGS="--steps 100"       a shorter training run, and humbler answers
    make demo ARGS="--stop"            stop the server that an earlier run left

Every step is a command that you could type yourself; each is printed before it runs. What is there already
(the base, the data, a trained adapter) is used again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from sacrebleu.metrics import CHRF

from okavango.platform.config import load_settings

ROOT = Path(__file__).resolve().parent.parent
OKAVANGO = Path(sys.executable).with_name("okavango")
DATA = ROOT / "demo" / "emoji"
ADAPTER = "emoji"
START_SECONDS = 180
ASKED_AT_ONCE = 8

console = Console()


@dataclass(frozen=True)
class Question:
    """A held-out picture. `expected`: its Unicode name."""

    picture: Path
    text: str
    expected: str


def main() -> None:
    options = parse_options()
    stop_server()
    if options.stop:
        return
    run("base", "build", "starter")
    run("data", "emoji", str(DATA))
    train(options.steps, options.retrain)
    address = start_server()
    client = OpenAI(base_url=f"{address}/v1", api_key="none needed on loopback")
    questions = held_out()
    show_answers(client, questions[:3])
    show_scores(client, questions[: options.score])
    console.print(f"\nThe server is still running. Studio: [bold]{address}/studio[/]  API: {address}/v1")
    console.print('Stop it with: make demo ARGS="--stop"')


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps; without it the recipe's own number")
    parser.add_argument("--retrain", action="store_true", help="train a new version even if there is one")
    parser.add_argument("--score", type=int, default=48, help="held-out pictures to score (default: 48)")
    parser.add_argument("--stop", action="store_true", help="only stop the server of an earlier run")
    return parser.parse_args()


def run(*arguments: str) -> None:
    """Run an okavango command in the foreground, shown first; end with it if it fails."""
    console.print(f"\n[bold cyan]$ okavango {' '.join(arguments)}[/]")
    done = subprocess.run([OKAVANGO, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(steps: int | None, retrain: bool) -> None:
    shown = subprocess.run(
        [OKAVANGO, "adapters", "show", ADAPTER, "--json"], capture_output=True, text=True, check=False
    )
    if shown.returncode == 0 and not retrain:
        console.print(f"\nThe adapter {ADAPTER!r} is trained already (--retrain makes a new version).")
        return
    files = ["--data", str(DATA / "train.jsonl"), "--eval", str(DATA / "validation.jsonl")]
    more = ["--steps", str(steps)] if steps else []
    run("train", "--base", "starter", *files, "--name", ADAPTER, *more)


def start_server() -> str:
    """Start `okavango serve` in a session of its own, so that it outlives this program; its address."""
    log = state_file().with_suffix(".log")
    command = [OKAVANGO, "serve", "--base", "starter", "--port", "0"]
    console.print("\n[bold cyan]$ okavango serve --base starter[/]")
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    state_file().write_text(json.dumps({"pid": server.pid}))
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        address = address_in(log.read_text())
        if address and is_ready(address):
            console.print(log.read_text().strip())
            return address
        time.sleep(0.5)
    sys.exit(f"the server did not start; its log:\n{log.read_text()}")


def address_in(banner: str) -> str | None:
    words = banner.split()
    return next((word.removesuffix("/v1") for word in words if word.endswith("/v1")), None)


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def stop_server() -> None:
    """Stop the server that an earlier run left, if it is still ours."""
    if not state_file().is_file():
        return
    pid = json.loads(state_file().read_text())["pid"]
    command = Path(f"/proc/{pid}/cmdline")
    if command.is_file() and b"okavango" in command.read_bytes():
        console.print(f"Stopping the server of an earlier run (process {pid}).")
        os.kill(pid, signal.SIGTERM)
    state_file().unlink()


def state_file() -> Path:
    path = load_settings().home / "demo-server.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def held_out() -> list[Question]:
    """The test split's pictures, in an order that mixes kinds: that of their digests."""
    rows = [json.loads(line)["messages"] for line in (DATA / "test.jsonl").read_text().splitlines()]
    questions = []
    for user, assistant in rows:
        parts = {part["type"]: part for part in user["content"]}
        picture = DATA / parts["image_url"]["image_url"]["url"]
        questions.append(Question(picture, parts["text"]["text"], assistant["content"]))
    return sorted(questions, key=lambda q: base64.b64encode(q.picture.read_bytes()[-64:]))


def ask(client: OpenAI, model: str, question: Question) -> str:
    url = "data:image/png;base64," + base64.b64encode(question.picture.read_bytes()).decode()
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question.text},
                ],
            }
        ],
        temperature=0,
        max_tokens=32,
    )
    return (answer.choices[0].message.content or "").strip()


def show_answers(client: OpenAI, questions: list[Question]) -> None:
    table = Table(title="Pictures that training has not seen", show_lines=True)
    for column in ("picture", "question", "is called", "starter", ADAPTER):
        table.add_column(column, overflow="fold")
    for question in questions:
        answers = [ask(client, model, question) for model in ("starter", ADAPTER)]
        table.add_row(question.picture.name, question.text, question.expected, *answers)
    console.print(table)


def show_scores(client: OpenAI, questions: list[Question]) -> None:
    """chrF and exact matches over the served answers, base and adapter on the same pictures."""
    expected = [question.expected for question in questions]
    table = Table(title=f"{len(questions)} held-out pictures, asked through the API")
    for column in ("model", "chrF", "exact"):
        table.add_column(column)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for model in ("starter", ADAPTER):
            answers = list(pool.map(lambda question, model=model: ask(client, model, question), questions))
            chrf = CHRF().corpus_score(answers, [expected]).score
            exact = sum(answer == name for answer, name in zip(answers, expected, strict=True))
            table.add_row(model, f"{chrf:.1f}", f"{exact} of {len(questions)}")
    console.print(table)


if __name__ == "__main__":
    main()
