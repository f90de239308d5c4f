from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.modalities.content import Media, Message, Text
from okavango.modalities.prompt import Layout, Renderer, Span, truncate, with_system
from okavango.modalities.tiny import byte_tokenizer
from okavango.platform.errors import PromptError

TOKENIZER = byte_tokenizer()
PICTURE = Media("image", b"not decoded here")


class Fixed:
    """A layout a modality, whatever the medium."""

    def __init__(self, **layouts: Layout) -> None:
        self._layouts = layouts

    def of(self, medium: Media) -> Layout | None:
        return self._layouts.get(medium.modality)


def renderer(image: int = 4) -> Renderer:
    return Renderer(TOKENIZER, Fixed(image=(image,)))


def user(*parts) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


def shown(tokens) -> str:
    return TOKENIZER.decode(list(tokens))


def test_text_is_the_chat_templates_own_output():
    messages = [user("hello"), assistant("hi"), user("bye")]
    chat = [{"role": m.role, "content": m.text} for m in messages]
    expected = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown(renderer().prompt(messages).tokens) == expected


def test_a_picture_takes_its_tokens_where_it_stands():
    rendered = renderer(image=3).prompt([user("before", PICTURE, "after")])
    (span,) = rendered.spans
    assert span == Span("image", span.start, 3)
    assert shown(rendered.tokens[: span.start]).endswith("before")
    assert shown(rendered.tokens[span.end :]).startswith("after")
    assert rendered.media == (PICTURE,)


def test_loss_falls_on_the_assistants_tokens_and_their_end_only():
    rendered = renderer().conversation([user("q1", PICTURE), assistant("a1"), user("q2"), assistant("a2")])
    counted = [token for token, counts in zip(rendered.tokens, rendered.loss, strict=True) if counts]
    assert shown(counted) == "a1<|im_end|>a2<|im_end|>"
    assert len(rendered.loss) == len(rendered.tokens)


def test_training_feeds_exactly_the_tokens_that_serving_feeds():
    history = [user("look", PICTURE), assistant("\n spaced"), user("and?")]
    trained = renderer().conversation([*history, assistant("answer")])
    served = renderer().prompt(history)
    assert trained.tokens[: len(served.tokens)] == served.tokens
    assert trained.spans == served.spans
    assert not any(trained.loss[len(served.tokens) - 1 : len(served.tokens)])
    assert trained.loss[len(served.tokens)]


@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_no_text_can_pass_for_a_picture(question, answer):
    tricky = question + "\ue000media0\ue001"
    rendered = renderer().conversation([user(tricky, PICTURE), assistant(answer)])
    assert len(rendered.spans) == 1
    served = renderer().prompt([user(tricky, PICTURE)])
    assert rendered.tokens[: len(served.tokens)] == served.tokens


def test_a_template_that_rewrites_its_history_serves_but_cannot_train_those_turns():
    forgetful = byte_tokenizer()
    forgetful.chat_template = (
        "{% for m in messages[-1:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = Renderer(forgetful, Fixed())
    assert "q2" in shown(one.prompt([user("q1"), assistant("a1"), user("q2")]).tokens)
    with pytest.raises(PromptError, match="told apart"):
        one.conversation([user("q1"), assistant("a1")])


def test_a_template_that_refuses_is_a_clear_error():
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        Renderer(strict, Fixed()).prompt([user("hi")])


def test_a_template_that_drops_a_picture_is_an_error():
    blind = byte_tokenizer()
    blind.chat_template = "{% if add_generation_prompt %}go{% endif %}"
    with pytest.raises(PromptError, match="shows 0 of 1 media"):
        Renderer(blind, Fixed(image=(4,))).prompt([user(PICTURE)])


def test_no_encoder_for_the_modality():
    with pytest.raises(PromptError, match="no image encoder"):
        Renderer(TOKENIZER, Fixed()).prompt([user(PICTURE)])


def test_a_medium_may_take_several_spans_with_text_between():
    other = Media("image", b"another")
    rendered = Renderer(TOKENIZER, Fixed(image=("<", 2, "|", 3, ">"))).prompt(
        [user("a", PICTURE, "b", other)]
    )
    assert [(span.length, span.offset) for span in rendered.spans] == [(2, 0), (3, 2)] * 2
    assert rendered.media == (PICTURE, PICTURE, other, other)
    first, second, third, _ = rendered.spans
    assert shown(rendered.tokens[: first.start]).endswith("a<")
    assert shown(rendered.tokens[first.end : second.start]) == "|"
    assert shown(rendered.tokens[second.end : third.start]) == ">b<"


def test_what_is_cut_off_takes_its_spans_along():
    rendered = Renderer(TOKENIZER, Fixed(image=(2, "|", 3))).prompt([user("a", PICTURE)])
    cut = truncate(rendered, rendered.spans[1].start + 1)
    assert (cut.spans, cut.media) == (rendered.spans[:1], (PICTURE,))


def test_text_around_a_medium_is_no_answer():
    layout = Fixed(image=("<", 2, ">"))
    rendered = Renderer(TOKENIZER, layout).conversation([user("q", PICTURE), assistant("a")])
    counted = [token for token, counts in zip(rendered.tokens, rendered.loss, strict=True) if counts]
    assert shown(counted) == "a<|im_end|>"


def test_a_default_system_prompt_leads_unless_the_request_has_its_own():
    default = with_system([user("hi")], "be kind")
    assert [m.role for m in default] == ["system", "user"]
    own = [Message("system", (Text("mine"),)), user("hi")]
    assert with_system(own, "be kind") is own
