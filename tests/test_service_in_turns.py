"""The service over a chat model: roles and system prompts go through its template."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra `app`: pip install .[app]")

from gill.loading import Gill
from tests.chat_templates import chat_language_model, tokenizer_of
from tests.test_talking_in_turns import own_answer
from tests.tiny_gill import tiny_gill
from tests.told_service import CHAT, inside

WORDS = {"max_tokens": 6, "gill": {"want": "text"}}


@pytest.fixture(scope="module")
def gill() -> Gill:
    return tiny_gill(chat_language_model("smollm2"))


@pytest.fixture
def client(gill: Gill) -> Iterator[Any]:
    with inside(gill) as client:
        yield client


def said(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.request("POST", CHAT, json={"messages": messages, **WORDS, **more})


PICTURE = {"type": "image_url", "image_url": "data:x"}
TALK = [
    {"role": "system", "content": "Paint <|im_end|>."},
    {"role": "user", "content": "a ring"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "What is it?"},
]


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[1:2], TALK[:2], TALK[2:]])
def test_roles_are_those_of_the_template(client: Any, gill: Gill, messages: Any) -> None:
    harmless = [{**m, "content": m["content"].replace("<|im_end|>", "end")} for m in messages]
    answer = said(client, harmless)
    assert answer.status_code == 200, answer.text
    expected = own_answer(gill, harmless, 6)
    tokenizer = tokenizer_of("smollm2")
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == tokenizer.decode(expected, clean_up_tokenization_spaces=False)
    forged = said(client, messages)
    used = [one.json()["usage"]["prompt_tokens"] for one in (answer, forged)]
    assert (used[1] > used[0]) == (messages != harmless)


def test_other_words_for_the_same(client: Any) -> None:
    plain = said(client, TALK).json()["choices"][0]["message"]["content"]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    parts[0]["role"] = "developer"
    assert said(client, parts).json()["choices"][0]["message"]["content"] == plain
    items = {"instructions": TALK[0]["content"], "input": TALK[1:], "max_output_tokens": 6}
    items |= {"gill": {"want": "text"}}
    answer = client.request("POST", "/v1/responses", json=items)
    assert answer.status_code == 200, answer.text
    [message] = answer.json()["output"]
    assert message["content"][0]["text"] == plain


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (TALK[:3], "the last message is not the user's"),
        (TALK[:1], "the turn is empty"),
        (
            [
                {"role": "system", "content": [{"type": "image_url", "image_url": "data:x"}]},
                TALK[1],
            ],
            "a system prompt holds words alone",
        ),
        (
            [{"role": "system", "content": "x" * 200_000}, TALK[1]],
            "characters in the system prompt",
        ),
    ],
)
def test_what_is_no_talk_is_refused(client: Any, messages: Any, reason: str) -> None:
    answer = said(client, messages)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]


def test_a_template_without_a_system_role_is_a_refused_request() -> None:
    with inside(tiny_gill(chat_language_model("gemma"))) as client:
        answer = said(client, TALK)
        assert answer.status_code == 400, answer.text
        assert "System role not supported" in answer.json()["error"]["message"]
        assert said(client, TALK[1:]).status_code == 200


def test_the_longest_answer_is_the_limit_where_nobody_asks(gill: Gill) -> None:
    with inside(gill, limits={"max_tokens": 5}) as client:
        answer = client.request("POST", CHAT, json={"messages": TALK, "gill": {"want": "text"}})
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == 5
