"""What the examples share: commands, shown before they run, and a server that outlives the example."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.console import Console

from okavango.platform.config import load_settings

OKAVANGO = Path(sys.executable).with_name("okavango")
START_SECONDS = 180

console = Console()


def run(*arguments: str) -> None:
    """Run an okavango command in the foreground, shown first; end with it if it fails."""
    console.print(f"\n[bold cyan]$ okavango {' '.join(arguments)}[/]")
    done = subprocess.run([OKAVANGO, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def start_server(base: str = "starter") -> str:
    """Start `okavango serve` in a session of its own, so that it outlives this program; its address."""
    log = state_file().with_suffix(".log")
    command = [OKAVANGO, "serve", "--base", base, "--port", "0"]
    console.print(f"\n[bold cyan]$ okavango serve --base {base}[/]")
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


def is_trained(adapter: str) -> bool:
    shown = subprocess.run(
        [OKAVANGO, "adapters", "show", adapter, "--json"], capture_output=True, text=True, check=False
    )
    return shown.returncode == 0


def ask(client: OpenAI, model: str, messages: Sequence[dict[str, Any]]) -> str:
    """The likeliest answer."""
    asked: Any = list(messages)
    answer = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=32)
    return (answer.choices[0].message.content or "").strip()


def about(picture: Path, text: str) -> dict[str, Any]:
    """A user's turn about a picture."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}
