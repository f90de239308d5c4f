"""`okavango base` as a user runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from okavango.modalities.base import Base, read_base
from okavango.modalities.packages import RECIPE, is_current
from okavango.platform.cli import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OKAVANGO_CACHE", str(tmp_path))
    return tmp_path


def okavango(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["base", *arguments])


def add(base: Base, *options: str, name: str = "mine") -> Result:
    encoder = ["--image-encoder", str(base.encoders["image"].path)]
    return okavango("add", name, "--decoder", str(base.decoder.path), *encoder, *options)


def test_add_says_where_the_base_lies(tiny_base: Base, cache: Path) -> None:
    result = add(tiny_base, "--image-tokens", "4", "--head-hidden", "8")
    assert result.exit_code == 0, result.output
    base = read_base(cache / "bases" / "mine")
    assert base.heads["image"].spec.hidden == 8
    assert str(base.folder) in result.output
    assert base.digest in result.output


def test_add_tells_an_error_in_one_line_and_exits_with_1(tiny_base: Base, cache: Path) -> None:
    assert add(tiny_base).exit_code == 0
    result = add(tiny_base)
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "--force replaces it" in result.output
    assert add(tiny_base, "--force").exit_code == 0


def test_list_names_every_base(tiny_base: Base, cache: Path) -> None:
    result = okavango("list")
    assert result.exit_code == 0
    assert "okavango base build starter" in result.output
    add(tiny_base)
    okavango("add", "text", "--decoder", str(tiny_base.decoder.path))
    result = okavango("list")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line
    ]
    digests = [read_base(cache / "bases" / name).digest[:12] for name in ("mine", "text")]
    assert rows == [
        ["mine", "LlamaForCausalLM", "107 k", "image 4 × 4", digests[0]],
        ["text", "LlamaForCausalLM", "107 k", "none", digests[1]],
    ]


def test_list_survives_a_decoder_that_has_gone(tiny_base: Base, cache: Path, tmp_path: Path) -> None:
    decoder = shutil.copytree(tiny_base.decoder.path, tmp_path / "d")
    okavango("add", "text", "--decoder", str(decoder))
    shutil.rmtree(decoder)
    result = okavango("list")
    assert result.exit_code == 0
    assert "missing" in result.output


def test_show_prints_every_field_of_base_toml(tiny_base: Base, cache: Path) -> None:
    add(tiny_base)
    output = okavango("show", "mine", "--verify").output
    base = read_base(cache / "bases" / "mine")
    for value in (base.digest, *base.components.values(), str(base.decoder.path), "512 tokens", "4 × 4"):
        assert value in output
    assert "every component is as its digest says" in output


def test_show_verify_finds_what_was_altered(tiny_base: Base, cache: Path) -> None:
    add(tiny_base, "--copy")
    (cache / "bases" / "mine" / "decoder" / "config.json").write_text("{}")
    assert okavango("show", "mine").exit_code == 0
    result = okavango("show", "mine", "--verify")
    assert result.exit_code == 1
    assert "decoder: differs from the digest" in result.output


def test_unknown_names_are_one_line_errors(cache: Path) -> None:
    for arguments in (("show", "nope"), ("build", "nope")):
        result = okavango(*arguments)
        assert result.exit_code == 1
        assert "'nope'" in result.output


def test_build_finds_the_base_that_is_there_without_loading_torch(tiny_base: Base, cache: Path) -> None:
    path = Path(shutil.copytree(tiny_base.folder, cache / "bases" / "starter")) / "base.toml"
    path.write_text(f'recipe = "{RECIPE}"\n{path.read_text()}')
    code = (
        "import sys; from okavango.platform.cli import app\n"
        "app(['base', 'build', 'starter'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(cache / "bases" / "starter") in done.stdout


def test_a_starter_base_of_an_older_recipe_is_not_the_one(tiny_base: Base, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_base.folder, tmp_path / "starter")) / "base.toml"
    assert not is_current(path.parent)
    path.write_text(f'recipe = "{RECIPE}"\n{path.read_text()}')
    assert is_current(path.parent)
    assert read_base(path.parent).recipe == RECIPE
    assert not is_current(tmp_path / "nowhere")
