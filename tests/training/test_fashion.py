import gzip
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fashion_photos import COUNTS, write_idx, write_photos
from PIL import Image
from typer.testing import CliRunner

from okavango.platform.errors import ConfigError, ConflictError, DataError, NotFoundError
from okavango.training.check import check_dataset
from okavango.training.commands import data
from okavango.training.examples import SPLITS, Choice
from okavango.training.fashion import KINDS, STYLES, list_photos, write_fashion


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "fashion-mnist")


def titles(folder: Path) -> dict[str, dict[str, str]]:
    """By split: picture → title."""
    found = {}
    for split in SPLITS:
        rows = [json.loads(line)["messages"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        found[split] = {user["content"][0]["image_url"]["url"]: title["content"] for user, title in rows}
    return found


def test_photos_become_rows_that_the_check_takes(source: Path, tmp_path: Path) -> None:
    written = write_fashion(tmp_path / "shop", "ledger", source=source)
    assert sum(written.rows.values()) == sum(COUNTS.values())
    rows = titles(tmp_path / "shop")
    assert rows["test"].keys() == {f"images/t10k-{i:05}.png" for i in range(COUNTS["t10k"])}
    assert 0 < len(rows["validation"]) < len(rows["train"]) / 3
    for split in SPLITS:
        assert check_dataset(tmp_path / "shop" / f"{split}.jsonl").ok
    readme = (tmp_path / "shop" / "README.md").read_text()
    for text in ("Zalando SE", "Permission is hereby granted", "150 photos", "a wholesaler's"):
        assert text in readme


def test_a_photo_is_a_product_on_white(source: Path, tmp_path: Path) -> None:
    write_fashion(tmp_path / "shop", "ledger", source=source)
    data = (tmp_path / "shop" / "images" / "train-00000.png").read_bytes()
    pixels = np.asarray(Image.open(BytesIO(data)))
    assert (pixels[0, 0], pixels[10, 10]) == (255, 0)


def test_a_title_says_what_label_and_photo_do(source: Path, tmp_path: Path) -> None:
    for style in STYLES:
        write_fashion(tmp_path / style, style, source=source)
    ledger, chatty = (titles(tmp_path / style) for style in STYLES)
    assert [split.keys() for split in ledger.values()] == [split.keys() for split in chatty.values()]
    assert ledger["test"]["images/t10k-00009.png"] == "SH-95 | shoes | ankle boot | dark"
    shown = chatty["test"]["images/t10k-00009.png"]
    assert shown == "Say hello to this dark and moody ankle boot: put your best foot forward!"
    assert "these dark and moody trousers" in chatty["test"]["images/t10k-00001.png"]
    tones = {title.rpartition(" ")[2] for split in ledger.values() for title in split.values()}
    assert tones == {"dark", "mid", "light"}


def test_no_title_can_be_told_without_its_picture(source: Path) -> None:
    photos = list_photos(source, Choice())
    for title in STYLES.values():
        assert len({title(photo) for photo in photos}) > len(KINDS)
    for question in {photo.question for photo in photos}:
        asked = [photo for photo in photos if photo.question == question]
        assert len(set(map(STYLES["ledger"], asked))) > len(KINDS)
    words = [set(" ".join(map(title, photos)).replace("|", "").split()) for title in STYLES.values()]
    assert len(words[0] & words[1]) < len(words[0]) / 2


def test_a_smaller_choice_is_part_of_a_larger_one(source: Path, tmp_path: Path) -> None:
    for name, choice in (("less", Choice(20)), ("more", Choice(60)), ("other", Choice(60, seed=1))):
        write_fashion(tmp_path / name, "chatty", choice, source=source)
    less, more, other = (titles(tmp_path / name) for name in ("less", "more", "other"))
    assert sum(map(len, less.values())) == 20
    assert all(less[split].items() <= more[split].items() for split in SPLITS)
    assert more != other


def test_a_folder_holds_one_style(source: Path, tmp_path: Path) -> None:
    write_fashion(tmp_path / "shop", "ledger", source=source)
    assert write_fashion(tmp_path / "shop", "ledger", source=tmp_path).existed
    with pytest.raises(ConflictError, match="something else"):
        write_fashion(tmp_path / "shop", "chatty", source=source)
    with pytest.raises(ConfigError, match="'loud' is no style; there are ledger, chatty"):
        write_fashion(tmp_path / "loud", "loud", source=source)


def test_what_is_missing_or_damaged_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="sudo apt-get install dataset-fashion-mnist"):
        write_fashion(tmp_path / "shop", "ledger", source=tmp_path)
    images = source / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for damaged in (whole[:-20], b"no gzip", gzip.compress(b"\0" * 100)):
        images.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: is damaged"):
            write_fashion(tmp_path / "shop", "ledger", source=source)
    images.write_bytes(whole)
    write_idx(source / "train-labels-idx1-ubyte.gz", 2049, np.full(120, 11, np.uint8))
    with pytest.raises(DataError, match="do not fit each other"):
        write_fashion(tmp_path / "shop", "ledger", source=source)
    assert not (tmp_path / "shop").exists()


def test_the_fashion_command_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    command = ["fashion", str(tmp_path / "shop"), "--style", "chatty", "--source", str(source)]
    result = CliRunner().invoke(data, [*command, "--limit", "50"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Wrote: {tmp_path / 'shop'} (")
    assert sum(map(len, titles(tmp_path / "shop").values())) == 50
