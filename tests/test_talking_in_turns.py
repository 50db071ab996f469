"""A chat model in conversation: what it reads is what its template writes, and so it answers."""

from typing import Any

import pytest
import torch
from PIL import Image

from app.talk import Talk
from gill.loading import Gill
from pipeline.frozen.turns import PICTURE, Message
from pipeline.talking.answers import ConversationError, ReplySettings, Side, Text
from pipeline.talking.captioning import words_after_pictures
from pipeline.talking.conversation import Conversation
from pipeline.talking.decoding import DecodingSettings
from pipeline.talking.prefixes import Prefixes
from pipeline.talking.reading import read_contexts
from tests.chat_templates import chat_language_model, tokenizer_of
from tests.tiny_gill import K, tiny_gill

FAMILIES = ["smollm2", "qwen3", "llama3", "mistral", "mistral-v3", "gemma"]
QUESTIONS = ["What is it?", "a ring\n", "Show me <|im_end|> [/INST] in the sea, please.", "no"]


@pytest.fixture(scope="module")
def gill() -> Gill:
    return tiny_gill(chat_language_model("smollm2"))


def words(count: int, **more: Any) -> ReplySettings:
    decoding = DecodingSettings(max_tokens=count, **more)
    return ReplySettings(want="text", decoding=decoding)


def own_answer(gill: Gill, talk: list[dict[str, str]], count: int, **options: Any) -> list[int]:
    """The oracle: transformers' own chat template and its own greedy generation."""
    tokenizer = tokenizer_of(gill.language_model.tokenizer.name_or_path or "smollm2")
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, **options)["input_ids"]
    model = gill.language_model.model
    read = torch.tensor([ids])
    said = model.generate(
        read, attention_mask=torch.ones_like(read), do_sample=False, max_new_tokens=count
    )[0, len(ids) :].tolist()
    return said[:-1] if said[-1] in gill.language_model.stop_ids else said


def named(name: str, **more: Any) -> Gill:
    gill = tiny_gill(chat_language_model(name, **more))
    gill.language_model.tokenizer.name_or_path = name
    return gill


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    options = {"template_options": {"enable_thinking": False}} if name == "qwen3" else {}
    gill = named(name, **options)
    talk: list[dict[str, str]] = []
    conversation = gill.conversation()
    for question in QUESTIONS[:2] + QUESTIONS[3:]:
        talk.append({"role": "user", "content": question})
        expected = own_answer(gill, talk, 7, **options.get("template_options", {}))
        reply = conversation.reply(question, words(7))
        # By their vectors: letters in several bytes are not spelled alike token by token.
        said = conversation._memory._read[-reply.answer_tokens :]
        assert torch.equal(said, gill.language_model.embed(torch.tensor(expected)))
        talk.append({"role": "assistant", "content": reply.text})


def test_an_answer_ends_where_the_model_ends_it() -> None:
    gill = named("smollm2")
    talk = [{"role": "user", "content": "a ring"}]
    first = own_answer(gill, talk, 9)
    ending = named("smollm2", ends=first[5])
    expected = own_answer(ending, talk, 9)
    assert expected == first[: first.index(first[5])]
    reply = ending.conversation().reply("a ring", words(9))
    assert reply.end == "stop"
    assert reply.answer_tokens == len(expected)


def test_turns_go_on_in_what_was_read(gill: Gill) -> None:
    going_on = gill.conversation()
    for number, question in enumerate(QUESTIONS):
        reply = going_on.reply(question, words(5))
        fresh = gill.conversation()
        for asked, answer in zip(QUESTIONS[:number], answers := _answers(going_on)):
            fresh.recall([asked, Side.ASSISTANT, answer])
        assert fresh.reply(question, words(5)).text == reply.text
        assert len(answers) == number + 1
        # All before it was read: the end of the last turn, the question, and the beginning.
        if number:
            assert reply.prompt_tokens < 45 < fresh.num_positions


def test_own_pictures_that_are_read_back_stand_in_the_turns(gill: Gill) -> None:
    asked = DecodingSettings(max_tokens=7, words_between_images=True, read_back="picture")
    going_on, fresh, words_alone = (gill.conversation() for _ in range(3))
    reply = going_on.reply(QUESTIONS[0], ReplySettings(want="generate", decoding=asked))
    parts = [p.text if isinstance(p, Text) else p.picture for p in reply]
    assert [type(part) for part in parts] == [Image.Image, str]
    fresh.recall([QUESTIONS[0], Side.ASSISTANT, *parts])
    words_alone.recall([QUESTIONS[0], Side.ASSISTANT, parts[1]])
    assert fresh.num_positions == going_on.num_positions == words_alone.num_positions + K
    assert going_on.reply("no", words(5)).text == fresh.reply("no", words(5)).text


def _answers(conversation: Conversation) -> list[str]:
    return [exchange[1].parts[0] for exchange in conversation._memory._exchanges]


def test_a_fork_and_known_prefixes_change_no_answer(gill: Gill) -> None:
    prefixes = Prefixes(2**24)
    first = gill.conversation(prefixes)
    first.reply(QUESTIONS[0], words(6))
    again = first.fork()
    assert first.reply("no", words(6)).text == again.reply("no", words(6)).text
    known = gill.conversation(prefixes)
    [started, *_] = list(known.stream(QUESTIONS[0], words(6)))
    assert started.cached_tokens > 20


def test_the_oldest_turns_are_dropped_whole() -> None:
    gill = named("smollm2", max_positions=160)
    conversation = gill.conversation()
    forgotten = 0
    for _ in range(8):
        reply = conversation.reply("What is it? Show me.", words(8))
        forgotten += reply.forgotten_turns
        talk = [
            {"role": one.role, "content": one.parts[0]}
            for exchange in conversation._memory._exchanges
            for one in exchange
        ]
        assert talk[0]["role"] == "user"
        said = gill.language_model.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
        if not reply.text.startswith(" ") and len(said) == 8:
            assert own_answer(gill, talk[:-1], 8) == said
    assert forgotten > 0
    assert conversation.num_forgotten == forgotten
    with pytest.raises(ConversationError, match="the turn takes .* which has 160 and needs"):
        conversation.reply("a b c d e f g h " * 20, words(8))


def test_a_turn_is_asked_again_otherwise(gill: Gill) -> None:
    talk = Talk(gill, {"max_tokens": 5})
    list(talk.ask(["a ring"], want="text"))
    first = talk.exchanges[0].answer[0].text
    list(talk.again(want="generate"))
    [exchange] = talk.exchanges
    assert exchange.answer[0].picture is not None
    list(talk.again(want="text"))
    assert talk.exchanges[0].answer[0].text == first
    list(talk.ask(["no"], want="text"))
    told = [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": first}]
    expected = own_answer(gill, [*told, {"role": "user", "content": "no"}], 5)
    spelled = tokenizer_of("smollm2").decode(expected, clean_up_tokenization_spaces=False)
    assert talk.exchanges[1].answer[0].text == spelled


def test_a_system_prompt_of_a_talk(gill: Gill) -> None:
    talk = [{"role": "system", "content": "Paint."}, {"role": "user", "content": "a ring"}]
    reply = gill.conversation(system_prompt="Paint.").reply("a ring", words(6))
    expected = tokenizer_of("smollm2").decode(own_answer(gill, talk, 6))
    assert reply.text == expected != gill.conversation().reply("a ring", words(6)).text
    recalled = gill.conversation()
    recalled.recall([Side.SYSTEM, "Paint.", Side.USER, "a ring", Side.ASSISTANT, reply.text])
    whole = gill.conversation(system_prompt="Paint.")
    whole.recall(["a ring", Side.ASSISTANT, reply.text])
    assert recalled.reply("no", words(6)).text == whole.reply("no", words(6)).text


def test_turns_that_a_template_refuses_are_refused_before_anything_is_read(gill: Gill) -> None:
    refusing = named("gemma")
    with pytest.raises(ConversationError, match="System role not supported"):
        refusing.conversation(system_prompt="Paint.")
    with pytest.raises(ConversationError, match="roles must alternate|System role"):
        refusing.conversation().recall([Side.ASSISTANT, "a", Side.USER, "b"])
    with pytest.raises(ConversationError, match="the turn is empty"):
        gill.reply([""])
    with pytest.raises(ConversationError, match="knows no system prompt"):
        tiny_gill().conversation(system_prompt="Paint.")


def test_pictures_stand_in_their_turn(gill: Gill) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    conversation = gill.conversation()
    turn = conversation.prepare(["what is ", picture, "?"])
    written = gill.language_model.turns.write([Message("user", ("what is ", PICTURE, "?"))])
    [first, place, last] = written
    k = gill.heads.sizes.k
    pooled = gill.encoder.encode_pictures([picture]).float()
    expected = torch.cat(
        [
            gill.language_model.embed(torch.tensor(first)),
            gill.model.visual_prefix(pooled)[0],
            gill.language_model.embed(torch.tensor(last)),
        ]
    )
    assert place is PICTURE
    assert len(turn.heard.embeddings) == len(first) + k + len(last)
    torch.testing.assert_close(turn.heard.embeddings, expected)
    # What a picture in an answer was is not remembered, its turn is.
    reply = conversation.reply([picture, "draw it"], gill.settings(want="generate"))
    assert reply.images
    assert conversation.num_turns == 1
    assert conversation.reply("a", words(4)).text


def test_contexts_are_turns_of_the_user(gill: Gill) -> None:
    picture = Image.new("RGB", (8, 8), "blue")
    hidden = read_contexts(gill.model, gill.encoder, [["a ring.", "it", picture], ["no"]])
    written = gill.language_model.turns.write([Message("user", ("a ring. it", PICTURE))])
    prefix = gill.model.visual_prefix(gill.encoder.encode_pictures([picture]).float())[0]
    parts = [prefix if part is PICTURE else torch.tensor(part) for part in written]
    torch.testing.assert_close(hidden[0], gill.model.image_hidden([parts])[0])


def test_a_context_that_is_too_long_keeps_the_beginning_of_its_turn_and_its_end() -> None:
    gill = named("smollm2", max_positions=100)
    text = "show me a ring in the sea " * 20
    hidden = read_contexts(gill.model, gill.encoder, [[text]])
    [ids] = gill.language_model.turns.write([Message("user", (text,))])
    opening = gill.language_model.turns.write([Message("user", (PICTURE,))])[0]
    kept = [*opening, *ids[len(ids) - (100 - gill.heads.sizes.r - len(opening)) :]]
    assert len(ids) > 100 == len(kept) + gill.heads.sizes.r
    torch.testing.assert_close(hidden[0], gill.model.image_hidden([[torch.tensor(kept)]])[0])


def test_questions_about_pictures_are_turns(gill: Gill) -> None:
    pooled = torch.randn(2, gill.encoder.width)
    [first, second] = words_after_pictures(gill.model, pooled, ["What is it?", ""], 6)
    for vector, prompt, said in ((pooled[0], "What is it?", first), (pooled[1], "", second)):
        reply = gill.conversation().reply([vector, prompt], words(6, stop_at_newline=True))
        assert reply.text.strip().partition("\n")[0].strip() == said


def test_likelihoods_are_those_of_answers(gill: Gill) -> None:
    [likelihood] = gill.log_likelihoods([["yes"]], ["a ring?"])
    tokenizer = tokenizer_of("smollm2")
    talk = [{"role": "user", "content": "a ring?"}]
    before = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    answer = tokenizer("yes", add_special_tokens=False)["input_ids"]
    logits = gill.language_model.model(torch.tensor([before + answer])).logits[0].float()
    odds = logits.log_softmax(-1)[len(before) - 1 : -1]
    expected = float(odds.gather(1, torch.tensor(answer)[:, None]).sum())
    assert likelihood.num_tokens == len(answer)
    assert likelihood.total == pytest.approx(expected, rel=1e-4)


def test_answers_may_have_lines_and_are_longer(gill: Gill) -> None:
    settings = gill.settings()
    assert not settings.decoding.stop_at_newline
    assert settings.decoding.max_tokens == 256
    assert tiny_gill().settings().decoding.stop_at_newline
