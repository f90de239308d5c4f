"""/v1/embeddings through OpenAI's own client and by hand: inputs, outputs, refusals, what is counted."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from server_fixtures import ENGINE, RunningServer, data_url, make_site, wait_until

from okavango.modalities.aligned import AlignedHeads, base_with
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, random_space, sound_bytes, write_tiny_bundle
from okavango.web.services import ServeOptions

PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": data_url(picture_bytes(3))}}
SOUND: dict[str, Any] = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(sound_bytes(4, 0.7)).decode(), "format": "wav"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A base and an adapter that embed, and an adapter that does not."""
    folder = tmp_path_factory.mktemp("embeddings")
    plain = write_tiny_base(folder / "plain", audio=True)
    base = base_with(folder, "both", plain, AlignedHeads({}, {}, embedding=random_space(plain, 9)))
    site = make_site(folder / "site", base)
    write_tiny_bundle(folder / "joint", base, seed=2, joint=True)
    write_tiny_bundle(folder / "none", base, seed=4)
    for name in ("joint", "none"):
        site.publish(name, folder / name)
    running = RunningServer(site, ServeOptions(engine=ENGINE))
    wait_until(lambda: not running.services.catalog.versions("registered"))
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def vectors(client: openai.OpenAI, asked: Any, model: str = "joint", **options: Any) -> np.ndarray:
    found = client.embeddings.create(model=model, input=asked, **options)
    assert [each.index for each in found.data] == list(range(len(found.data)))
    return np.array([each.embedding for each in found.data], np.float32)


def test_texts_ids_and_media_in_one_call(client: openai.OpenAI) -> None:
    asked = ["a cat", PICTURE, [97, 32, 99, 97, 116], SOUND, {"type": "text", "text": "a cat"}]
    together = vectors(client, asked)
    assert together.shape == (5, 24)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(together, np.concatenate([vectors(client, [each]) for each in asked]))
    # the tiny tokenizer knows bytes, in an order of its own
    np.testing.assert_array_equal(together[0], together[4])
    assert not np.array_equal(together[0], together[2])
    np.testing.assert_array_equal(vectors(client, "a cat"), together[:1])
    np.testing.assert_array_equal(vectors(client, [97, 32, 99, 97, 116]), together[2:3])


def test_numbers_and_base64_are_the_same_vector(client: openai.OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    numbers = client.embeddings.create(model="joint", input="x", encoding_format="float").data[0].embedding
    assert isinstance(numbers, list)
    coded: Any = (
        client.embeddings.create(model="joint", input="x", encoding_format="base64").data[0].embedding
    )
    assert list(struct.unpack("<24f", base64.b64decode(coded))) == pytest.approx(numbers, rel=1e-6)
    assert vectors(client, "x")[0].tolist() == pytest.approx(numbers, rel=1e-6)


def test_base_and_adapter_answer_from_spaces_of_their_own(client: openai.OpenAI) -> None:
    own, adapters = (vectors(client, [PICTURE, "x"], model) for model in ("both", "joint"))
    assert not np.allclose(own, adapters)
    np.testing.assert_array_equal(adapters, vectors(client, [PICTURE, "x"], "joint@1"))


def test_an_answer_says_what_made_it_and_what_it_took(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.metric('okavango_requests_total{model="joint@1",status="embedded"}')
    new = {"type": "image_url", "image_url": {"url": data_url(picture_bytes(77))}}
    raw = client.embeddings.with_raw_response.create(model="joint", input=["ab", new, new])
    assert raw.headers["x-okavango-adapter"] == "joint@1"
    body = raw.http_response.json()
    assert body["object"] == "list"
    assert body["model"] == "joint"
    assert body["okavango"]["adapter"] == "joint@1"
    details = {"features_cached": 1, "image_tokens": 8, "audio_tokens": 0}
    assert body["usage"] == {"prompt_tokens": 10, "total_tokens": 10, "prompt_tokens_details": details}
    assert server.metric('okavango_requests_total{model="joint@1",status="embedded"}') == before + 1


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"input": []}, "input", "is empty"),
        ({"input": ""}, "input", "is empty"),
        ({"input": ["a", ""]}, "input[1]", "is empty"),
        ({"input": [[1], []]}, "input[1]", "is empty"),
        ({"input": 5}, "input", "must be a text"),
        ({"input": ["a", None]}, "input[1]", "must be a text"),
        ({"input": [True]}, "input[0]", "must be a text"),
        ({"input": [1, "a"]}, "input[1]", "must be a token id"),
        ({"input": [1, 99_999]}, "input[1]", "there is no token 99999"),
        ({"input": [[1], [-1]]}, "input[1][0]", "there is no token -1"),
        ({"input": ["x"] * 2049}, "input", "over the limit of 2,048"),
        ({"input": [PICTURE] * 65}, "input", "over the limit of 64"),
        ({"input": "x" * 600}, "input", "over the context"),
        (
            {"input": {"type": "image_url", "image_url": {"url": "http://x/y.png"}}},
            "input.image_url.url",
            "data",
        ),
        ({"input": ["a", {"type": "video"}]}, "input[1].type", "video"),
        ({"input": ["a", {**PICTURE, "typo": 1}]}, "input[1].typo", "unknown key"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": data_url(b"no")}}]},
            "input[0].image_url.url",
            "",
        ),
        ({"dimensions": 12}, "dimensions", "gives vectors of 24"),
        ({"encoding_format": "hex"}, "encoding_format", "float"),
        ({"inputs": "x"}, "inputs", "did you mean input?"),
        ({"model": "none"}, "model", "has no space of embeddings"),
        ({"model": "nobody"}, "model", "does not exist"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(
    server: RunningServer, fields: dict[str, Any], where: str, said: str
) -> None:
    answer = server.post("/v1/embeddings", {"model": "joint", "input": "x", **fields})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), error
    assert (error["param"], said in error["message"]) == (where, True), error


def test_the_spaces_width_may_be_asked_for(client: openai.OpenAI) -> None:
    assert vectors(client, "x", dimensions=24).shape == (1, 24)
