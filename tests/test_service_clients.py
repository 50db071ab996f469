"""The service by the clients that people have: unmodified, from the extra `clients`."""

import base64
import io
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
pytest.importorskip("fastapi", reason="the service needs the extra `app`: pip install .[app]")

from tests.told_service import (
    Director,
    body_of,
    image_part,
    openai,
    picture_of,
    serving,
    uri_of,
)

CASES = int(os.environ.get("GILL_SCHEMA_CASES", "300"))
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def director(monkeypatch: pytest.MonkeyPatch) -> Director:
    return Director.installed(monkeypatch)


@pytest.fixture
def running(director: Director) -> Iterator[Any]:
    with serving(director.gill) as running:
        yield running


def color(url: str) -> Any:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))


def test_openai_streams_one_picture_and_two(running: Any) -> None:
    for number in (1, 2):
        knobs = {"gill": {"want": "generate", "max_images": number}}
        with openai(running.url).chat.completions.stream(
            **body_of("a red ring"), extra_body=knobs, seed=3
        ) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_completion().choices[0].message
        assert kinds.count("content.delta") >= 3
        assert message.content == " a red ring"
        assert [one["index"] for one in message.images] == list(range(number))
        assert [color(one["image_url"]["url"]) for one in message.images] == [RED] * number
        assert [one["gill"]["seed"] for one in message.parts] == [3, 4][:number]
        # As it came, it may be sent back: its words are read.
        asked = [*body_of("x")["messages"], message.model_dump(), *body_of("y")["messages"]]
        again = openai(running.url).chat.completions.create(model="gill", messages=asked)
        assert again.choices[0].message.content == " x a red ring y"


def test_openai_parses_and_finds_the_model(running: Any) -> None:
    client = openai(running.url)
    parsed = client.chat.completions.parse(**body_of("a red ring"))
    assert parsed.choices[0].message.content == " a red ring"
    assert parsed.choices[0].message.parsed is None
    assert client.models.retrieve("gill").id == "gill"
    library = pytest.importorskip("openai")
    with pytest.raises(library.NotFoundError, match="the model here is 'gill'"):
        client.models.retrieve("gpt-5")


def test_openai_generates_images(running: Any) -> None:
    client = openai(running.url)
    answer = client.images.generate(
        prompt="a red ring", n=2, size="4x4", response_format="b64_json", extra_body={"seed": 5}
    )
    assert [one.gill["seed"] for one in answer.data] == [5, 6]
    for one in answer.data:
        assert color(f"data:image/png;base64,{one.b64_json}") == RED
    assert (answer.size, answer.output_format) == ("4x4", "png")
    assert answer.usage.input_tokens == 2 * 3
    [one] = client.images.generate(prompt="a ring", response_format="url", quality="high").data
    assert re.fullmatch(rf"{running.url}/v1/pictures/[\w-]{{32}}\.png", one.url)
    library = pytest.importorskip("openai")
    with pytest.raises(library.BadRequestError, match="pictures made here are 4x4") as refused:
        client.images.generate(prompt="a red ring", size="1024x1024")
    assert refused.value.param == "size"


def test_openai_creates_responses(running: Any) -> None:
    client = openai(running.url)
    shown = {"type": "input_image", "image_url": uri_of(picture_of("green")), "detail": "auto"}
    asked: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a red ring"}, shown]}
    ]
    want = {"gill": {"want": "retrieve"}}
    answer = client.responses.create(model="gill", input=asked, extra_body=want)
    assert (answer.status, answer.output_text) == ("completed", " a red ring")
    assert [item.type for item in answer.output] == ["message", "image_generation_call"]
    assert color(f"data:image/png;base64,{answer.output[1].result}") == BLUE
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3 + 4, 3)
    asked += [item.model_dump() for item in answer.output]
    asked += [{"role": "user", "content": "and again"}]
    again = client.responses.create(model="gill", input=asked, instructions="be brief")
    assert again.output_text == " be brief a red ring a red ring and again"


def test_openai_streams_responses(running: Any) -> None:
    with openai(running.url).responses.stream(
        model="gill", input="a red ring", extra_body={"gill": {"want": "generate"}}
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "output_item.added"),
        *("image_generation_call.in_progress", "image_generation_call.generating"),
        *("image_generation_call.completed", "output_item.done", "completed"),
    ]
    assert final.output_text == " a red ring"
    assert color(f"data:image/png;base64,{final.output[1].result}") == RED


def test_litellm_gets_pictures_and_sends_the_answer_back(running: Any) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm comes with the extra `clients`")
    asked: list[Any] = body_of("a red ring", image_part(uri_of(picture_of("green"))))["messages"]
    about = {
        "model": "openai/gill",
        "api_base": f"{running.url}/v1",
        "api_key": "unused",
        "extra_body": {"gill": {"want": "generate"}},
    }
    message = litellm.completion(messages=asked, **about).choices[0].message
    assert message.content == " a red ring"
    assert [color(one["image_url"]["url"]) for one in message.images] == [RED]
    again = litellm.completion(
        messages=[*asked, message, {"role": "user", "content": "and again"}], **about
    )
    assert again.choices[0].message.content == " a red ring a red ring and again"

    said, pictures = "", []
    for chunk in litellm.completion(messages=asked, stream=True, **about):
        delta = chunk.choices[0].delta
        said += delta.content or ""
        pictures += getattr(delta, "images", None) or []
    assert said == " a red ring"
    assert [color(one["image_url"]["url"]) for one in pictures] == [RED]


def test_langchain_gets_pictures_as_markdown(running: Any) -> None:
    library = pytest.importorskip(
        "langchain_openai", reason="langchain-openai comes with the extra `clients`"
    )
    chat = library.ChatOpenAI(
        model="gill",
        base_url=f"{running.url}/v1",
        api_key="unused",
        extra_body={"pictures": "markdown", "gill": {"want": "retrieve"}},
    )
    answer = chat.invoke("a blue ring")
    link = re.fullmatch(
        rf" a blue ring !\[retrieved picture\]\(({running.url}/v1/pictures/[\w-]{{32}}\.png)\)",
        answer.content,
    )
    assert link, answer.content
    again = chat.invoke([("human", "a blue ring"), answer, ("human", "and again")])
    assert again.content.startswith(" a blue ring a blue ring and again !")
    said = "".join(str(piece.content) for piece in chat.stream("a blue ring"))
    assert said.startswith(" a blue ring ![retrieved picture](http")


def test_lmms_eval_asks_about_pictures_of_the_miniature(running: Any) -> None:
    library = pytest.importorskip(
        "lmms_eval.models.simple.openai", reason="lmms-eval is not installed"
    )
    from lmms_eval.api.instance import Instance

    from miniature.drawing import render
    from miniature.world import SCENES_OF

    pictures = [Image.fromarray(pixels) for pixels in render(SCENES_OF["test"][:3], seed=0)]
    model = library.OpenAICompatible(
        model_version="gill", base_url=f"{running.url}/v1", api_key="unused", num_concurrent=2
    )
    model.task_dict = {"colors": {"test": pictures}}
    asked = [
        Instance(
            request_type="generate_until",
            arguments=(
                f"Q: what color is {number} ? A:",
                {"max_new_tokens": 16, "temperature": 0, "until": ["\n"]},
                lambda picture: [picture],
                number,
                "colors",
                "test",
            ),
            idx=0,
            metadata={"task": "colors", "doc_id": number, "repeats": 1},
        )
        for number in range(3)
    ]
    told = [getattr(answer, "text", answer) for answer in model.generate_until(asked)]
    assert [text.strip() for text in told] == [f"Q: what color is {n} ? A:" for n in range(3)]


def test_schemathesis_finds_nothing(running: Any) -> None:
    """No server error, and every answer as /openapi.json says; `make client-tests` has 50,000."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis comes with the extra `clients`"
    )
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # That a body is of the right shape does not say that its pictures are pictures.
    beyond_shapes = [positive_data_acceptance]
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 9
    tried = 0
    # Requests for answers have bodies to spoil; what has none is soon exhausted.
    answering = [one for one in operations if one.method == "post"]
    for operation in operations:
        share = CASES // len(answering) if operation in answering else 20
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=share // 2, deadline=None, suppress_health_check=list(HealthCheck)
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def call(case: Any) -> None:
                nonlocal tried
                tried += 1
                case.call_and_validate(excluded_checks=beyond_shapes)

            try:
                call()
            except Unsatisfiable:
                continue  # there is nothing to spoil
    assert tried > CASES * 0.8
