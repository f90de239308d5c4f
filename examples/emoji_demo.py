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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo_server import about, ask, console, is_trained, run, start_server, stop_server
from openai import OpenAI
from rich.table import Table
from sacrebleu.metrics import CHRF

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "demo" / "emoji"
ADAPTER = "emoji"
ASKED_AT_ONCE = 8


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


def train(steps: int | None, retrain: bool) -> None:
    if is_trained(ADAPTER) and not retrain:
        console.print(f"\nThe adapter {ADAPTER!r} is trained already (--retrain makes a new version).")
        return
    files = ["--data", str(DATA / "train.jsonl"), "--eval", str(DATA / "validation.jsonl")]
    more = ["--steps", str(steps)] if steps else []
    run("train", "--base", "starter", *files, "--name", ADAPTER, *more)


def held_out() -> list[Question]:
    """The test split's pictures, in an order that mixes kinds: that of their digests."""
    rows = [json.loads(line)["messages"] for line in (DATA / "test.jsonl").read_text().splitlines()]
    questions = []
    for user, assistant in rows:
        parts = {part["type"]: part for part in user["content"]}
        picture = DATA / parts["image_url"]["image_url"]["url"]
        questions.append(Question(picture, parts["text"]["text"], assistant["content"]))
    return sorted(questions, key=lambda q: base64.b64encode(q.picture.read_bytes()[-64:]))


def answer_of(client: OpenAI, model: str, question: Question) -> str:
    return ask(client, model, [about(question.picture, question.text)])


def show_answers(client: OpenAI, questions: list[Question]) -> None:
    table = Table(title="Pictures that training has not seen", show_lines=True)
    for column in ("picture", "question", "is called", "starter", ADAPTER):
        table.add_column(column, overflow="fold")
    for question in questions:
        answers = [answer_of(client, model, question) for model in ("starter", ADAPTER)]
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
            answers = list(
                pool.map(lambda question, model=model: answer_of(client, model, question), questions)
            )
            chrf = CHRF().corpus_score(answers, [expected]).score
            exact = sum(answer == name for answer, name in zip(answers, expected, strict=True))
            table.add_row(model, f"{chrf:.1f}", f"{exact} of {len(questions)}")
    console.print(table)


if __name__ == "__main__":
    main()
