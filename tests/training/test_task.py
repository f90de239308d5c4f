"""Whatever data look like, a job reads the same rows from them."""

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from training_fixtures import NAMES, Workshop

from okavango.platform.errors import DataError
from okavango.training.dataset import Dataset
from okavango.training.monitor import Monitor
from okavango.training.task import Task, read_task
from okavango.training.worker import run_job, submit

QUESTION = "What is this?"


def llava(i: int) -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": NAMES[i]}]
    return {"id": i, "image": f"images/{i}.png", "conversations": talk}


def sharegpt(i: int) -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": NAMES[i]}]
    return {"conversations": talk, "images": [f"images/{i}.png"]}


def openai(i: int) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": f"images/{i}.png"}},
        {"type": "text", "text": QUESTION},
    ]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": NAMES[i]}]}


@pytest.fixture
def forms(workshop: Workshop) -> dict[str, Path]:
    """The same eight rows in every way."""
    folder, count = workshop.folder, range(len(NAMES))
    lines = "".join(json.dumps(openai(i)) + "\n" for i in count)
    (folder / "openai.jsonl").write_text(lines)
    (folder / "sharegpt.json").write_text(json.dumps([sharegpt(i) for i in count]))
    with zipfile.ZipFile(folder / "llava.zip", "w") as archive:
        archive.writestr("llava.json", json.dumps([llava(i) for i in count], indent=1))
        for i in count:
            archive.write(folder / "images" / f"{i}.png", f"images/{i}.png")
    text = datasets.Value("string")
    features = datasets.Features({"instruction": text, "output": text, "image": datasets.Image()})
    rows = [
        {
            "instruction": QUESTION,
            "output": NAMES[i],
            "image": {"bytes": (folder / "images" / f"{i}.png").read_bytes(), "path": None},
        }
        for i in count
    ]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "alpaca.parquet")
    names = ("openai.jsonl", "sharegpt.json", "llava.zip", "alpaca.parquet")
    return {name: folder / name for name in names}


def test_every_format_is_rendered_alike(workshop: Workshop, forms: dict[str, Path]) -> None:
    found = {}
    for name, path in forms.items():
        spec = workshop.spec(data=path, eval=path)
        task = read_task(spec, workshop.base, Monitor(), cache=workshop.settings.data)
        found[name] = [(row.tokens.tolist(), row.loss.tolist(), row.media) for row in task.held_out_rows]
        assert task.fingerprint
    first = found.pop("openai.jsonl")
    assert len(first) == len(NAMES)
    assert all(rows == first for rows in found.values())


def test_a_job_learns_from_an_archive(workshop: Workshop, forms: dict[str, Path]) -> None:
    spec = workshop.spec(data=forms["llava.zip"], eval=forms["alpaca.parquet"], steps=2)
    job = submit(workshop.catalog, workshop.settings, spec)
    outcome = run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())
    lineage = json.loads((workshop.store.fetch(outcome.version.digest) / "manifest.json").read_text())
    assert "llava.zip#llava.json" in json.dumps(lineage)
    assert [sample.expected for sample in outcome.samples] == list(NAMES)


def test_a_job_may_name_its_format(workshop: Workshop, forms: dict[str, Path]) -> None:
    spec = workshop.spec(data=forms["sharegpt.json"], format="llava")
    with pytest.raises(DataError, match="8 faults") as caught:
        read_task(spec, workshop.base, Monitor())
    assert "is written as sharegpt, and the data are read as llava as was asked for" in caught.value.faults[0]


def test_every_format_holds_the_same_rows_out(workshop: Workshop, forms: dict[str, Path]) -> None:
    found = set()
    for path in forms.values():
        spec = workshop.spec(data=path, hold_out=0.25, seed=5)
        task = read_task(spec, workshop.base, Monitor(), cache=workshop.settings.data)
        assert task.held_out is not None
        kept, held_out = ({row.line for row in data.rows()} for data in (task.data, task.held_out))
        assert (len(kept), len(held_out), kept | held_out) == (6, 2, set(range(1, len(NAMES) + 1)))
        assert (len(task.rows), len(task.held_out_rows)) == (6, 2)
        assert task.data.digest != task.held_out.digest
        found.add(frozenset(held_out))
    assert len(found) == 1
    other = workshop.spec(data=forms["openai.jsonl"], hold_out=0.25, seed=6)
    assert {row.line for row in _held_out(read_task(other, workshop.base, Monitor())).rows()} not in found


def _held_out(task: Task) -> Dataset:
    assert task.held_out is not None
    return task.held_out


def test_held_out_rows_are_answered_and_not_learned_from(workshop: Workshop, forms: dict[str, Path]) -> None:
    spec = workshop.spec(data=forms["openai.jsonl"], hold_out=0.3, steps=2)
    expected = [row.messages[-1].text for row in _held_out(read_task(spec, workshop.base, Monitor())).rows()]
    job = submit(workshop.catalog, workshop.settings, spec)
    outcome = run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())
    assert [sample.expected for sample in outcome.samples] == expected
    assert [NAMES[sample.line - 1] for sample in outcome.samples] == expected
    assert {"chrf", "base_chrf"} <= set(outcome.version.metrics)
    assert outcome.version.lineage["data"]["rows"] + outcome.version.lineage["eval"]["rows"] == len(NAMES)


def test_one_row_is_too_few_to_hold_any_out(workshop: Workshop, forms: dict[str, Path]) -> None:
    path = workshop.folder / "one.jsonl"
    path.write_text(forms["openai.jsonl"].read_text().splitlines()[0])
    with pytest.raises(DataError, match="none can be held out"):
        read_task(workshop.spec(data=path, hold_out=0.5), workshop.base, Monitor())
