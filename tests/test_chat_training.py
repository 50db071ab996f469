"""A chat model's training documents, their batches, and that the frozen model keeps its words."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from corpora.chat_requests import Phrasings, Said
from gill_errors import InputError, StageError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.document_objective import document_losses
from pipeline.bridge.documents import DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.settings import MapperSizes, Objective
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.talking.own_words import own_words
from settings.params import Params, ParamsError, parse_params
from settings.replies import RepliesParams
from stages import chat_batches, reply_store
from stages.chat_batches import ChatBatches
from stages.chat_documents import ChatDocuments, usable
from stages.reply_file import Reply, Request, read_replies
from stages.reply_store import answer, make_replies
from tests.chat_templates import chat_language_model, tokenizer_of
from tests.tiny_language_models import tiny_model, tiny_tokenizer

WAYS = Phrasings(("Draw {caption}.", "{caption}."), ("{question} Then {caption}.",), ("What?", ""))
CAPTIONS = ["a ring in the sea.", "a green square.", "the desert at night.", "three rings."]
QUESTIONS = ["What is the capital of France?", "How many rings are there?", "Where is Paris?"]


@pytest.fixture(scope="module")
def language_model() -> Any:
    return chat_language_model("smollm2")


@pytest.fixture
def gill(language_model: Any) -> MultimodalLanguageModel:
    torch.manual_seed(0)
    mapper = MapperSizes(encoder_layers=1, decoder_layers=1)
    sizes = HeadSizes(d=6, e=language_model.width, k=2, r=3, L=4, D=5, m=8, p=4, mapper=mapper)
    return MultimodalLanguageModel(language_model, Heads(sizes))


@pytest.fixture
def documents(language_model: Any) -> ChatDocuments:
    return ChatDocuments(language_model, WAYS, 12)


def question(text: str) -> Request:
    return Request((Said("user", text),))


def template_ids(content: str, answer: str | None = None) -> list[int]:
    """The oracle: transformers' own chat template."""
    said = [{"role": "user", "content": content}]
    if answer is not None:
        said.append({"role": "assistant", "content": answer})
    return tokenizer_of("smollm2").apply_chat_template(
        said, tokenize=True, add_generation_prompt=answer is None
    )["input_ids"]


def written(document: Any, start: list[int]) -> list[Any]:
    return start + [i for p in document for i in (p.ids if isinstance(p, Words) else [p])]


def test_documents_are_turns_as_the_template_writes_them(documents, language_model):
    start, draws = list(language_model.start_ids), random.Random(0)
    for _ in range(4):
        document = documents.asked("a ring.", 7, draws)
        assert written(document, start) in [
            [*template_ids("Draw a ring."), Drawn(7)],
            [*template_ids("a ring."), Drawn(7)],
        ]
    reply = Reply(question("Where is it?"), (5, 6), ended=True)
    [end] = language_model.turns.end_ids
    assert written(documents.told(reply), start) == [*template_ids("Where is it?"), 5, 6, end]
    assert documents.told(reply)[-1] == Words((5, 6, end), "image_token")
    joined = documents.joined(reply, 3)
    assert written(joined, start) == [*template_ids("Where is it?"), 5, 6, Drawn(3)]
    assert [p.supervised for p in joined[:-1]] == ["no", "image_token"]
    shown = documents.shown("a ring.", 2, draws)
    assert [type(part) for part in shown] == [Words, Shown, Words, Words]
    # After the answer the template writes a line break, which nobody waits for.
    whole = template_ids("What?", "a ring.")
    ids = [i for i in written(shown, start) if not isinstance(i, Shown)]
    assert ids in [whole[: len(ids)], template_ids("", "a ring.")[: len(ids)]]
    assert ids[-1] == end
    assert shown[-1].supervised == "words"


def test_a_reply_that_was_cut_and_a_caption_that_is_cut_are_not_ended(documents, language_model):
    [end] = language_model.turns.end_ids
    cut = documents.told(Reply(question("a"), (5,), ended=False))
    assert cut[-1] == Words((5,), "image_token")
    long = documents.shown("ring " * 40, 0, random.Random(0))
    assert len(long[-1].ids) <= 12
    assert end not in long[-1].ids


def test_a_picture_comes_after_words_that_were_ended():
    cut, ended = (Reply(Request(question("a").messages, row=4), (5,), e) for e in (False, True))
    plain = Reply(question("a"), (5,), ended=False)
    empty = Reply(question("a"), (), ended=False)
    assert usable([cut, ended, plain, empty], "joined") == [ended]
    assert usable([cut, ended, plain, empty], "told") == [plain]


def test_a_model_of_plain_texts_has_no_turns():
    from pipeline.frozen.language_model import LanguageModel

    plain = LanguageModel(tiny_model("opt", torch.float32), tiny_tokenizer())
    with pytest.raises(InputError, match="model.turns: chat"):
        ChatDocuments(plain, WAYS, 12)


# --- the frozen model's own words --------------------------------------------------------------


def generated(language_model: Any, text: str, count: int) -> list[int]:
    """The oracle: transformers' own greedy generation of one prompt."""
    ids = torch.tensor([template_ids(text)])
    said = language_model.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    return said[0, ids.shape[1] :].tolist()


def test_own_words_are_those_of_generate(language_model):
    said = own_words(language_model, [template_ids(text) for text in QUESTIONS], 9)
    for text, words in zip(QUESTIONS, said, strict=True):
        expected = generated(language_model, text, 9)
        assert list(words.ids) + expected[len(words.ids) :] == expected
        assert words.ended == (expected[-1] in language_model.stop_ids)


def test_own_words_end_where_the_model_ends_them():
    whole = generated(chat_language_model("smollm2"), QUESTIONS[0], 9)
    ending = chat_language_model("smollm2", ends=whole[4])
    [words] = own_words(ending, [template_ids(QUESTIONS[0])], 9)
    assert words.ended
    assert list(words.ids) == whole[: whole.index(whole[4])]


def test_a_prompt_without_room_for_an_answer_is_refused(language_model):
    with pytest.raises(InputError, match="still answer"):
        own_words(language_model, [[3] * language_model.max_positions], 4)


def test_penalties_of_the_model_itself_do_not_change_its_own_words(language_model):
    prompts = [template_ids(text) for text in QUESTIONS]
    before = own_words(language_model, prompts, 9)
    settings = language_model.model.generation_config
    settings.repetition_penalty = 5.0
    try:
        assert own_words(language_model, prompts, 9) == before
    finally:
        settings.repetition_penalty = 1.0


def test_what_is_told_reaches_the_image_rows_alone(gill, documents):
    told = documents.told(answer(gill.language_model, [question(QUESTIONS[0])], 6)[0])
    batch = DocumentBatch((told,), torch.zeros(0, 6), torch.zeros(0, 4, 5), torch.zeros(0).long())
    document_losses(gill, batch, Objective.paper()).total.backward()
    reached = {n for n, p in gill.heads.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"image_embeddings"}


def test_trained_it_keeps_its_words_and_draws_what_is_asked_for(gill, documents, language_model):
    torch.manual_seed(0)
    replies = answer(language_model, [question(text) for text in QUESTIONS], 8)
    asked = [documents.asked(c, n, random.Random(n)) for n, c in enumerate(CAPTIONS)]
    batch = DocumentBatch(
        (*asked, *map(documents.told, replies)),
        torch.randn(4, 6),
        torch.randn(4, 4, 5),
        torch.arange(4),
    )
    rows = gill.heads.image_embeddings
    with torch.no_grad():  # as if pictures came after everything
        rows[0] = language_model.output_rows[[r.ids[0] for r in replies]].mean(0) * 2
    optimizer = torch.optim.Adam([rows], lr=0.2)
    settings = DecodingSettings(max_tokens=8)

    def said(text: str, settings: DecodingSettings = settings) -> Any:
        prompt = language_model.embed(torch.tensor(template_ids(text)))
        return decode(gill, Context(language_model), [prompt], settings)[0]

    assert any(said(text).images for text in QUESTIONS)
    for _ in range(25):
        optimizer.zero_grad()
        document_losses(gill, batch, Objective.paper()).image_token.backward()
        optimizer.step()
    for text, reply in zip(QUESTIONS, replies, strict=True):
        assert said(text).token_ids == list(reply.ids)
        off = said(text, settings.model_copy(update={"max_images": 0}))
        assert off.token_ids == list(reply.ids)
    ways = [way.replace("{caption}", c.removesuffix(".")) for c in CAPTIONS for way in WAYS.asked]
    drawn = [said(text).token_ids[0] == language_model.num_rows for text in ways]
    assert sum(drawn) >= len(CAPTIONS)  # one way of each was trained


def test_the_distribution_over_words_is_the_frozen_models(gill, language_model):
    ids = torch.tensor([template_ids(QUESTIONS[0])])
    own = language_model.model(ids).logits[0, -1, : language_model.num_rows].softmax(-1)
    context = Context(language_model)
    context.note(0, language_model.embed(ids[0]))
    context.read()
    ours = language_model.logits(context.last_hidden[0]).softmax(-1)
    assert torch.allclose(ours, own, rtol=0, atol=1e-6)


# --- the store of replies ----------------------------------------------------------------------


class Table:
    """A caption table of four rows, all for training."""

    def rows_of_split(self, split: str) -> np.ndarray:
        return np.arange(4) if split == "train" else np.arange(0)

    def captions(self, rows: np.ndarray) -> list[str]:
        return [CAPTIONS[int(row)] for row in rows]


@pytest.fixture
def store(monkeypatch, language_model, tmp_path):
    """Makes replies to three questions and two joined ones; gives the file and how to make it."""
    monkeypatch.setattr(reply_store, "load_language_model", lambda *a, **k: language_model)
    monkeypatch.setattr(reply_store, "set_up", lambda *a: "cpu")
    monkeypatch.setattr(reply_store, "_BATCH", 2)
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(f'{{"messages": [{{"role": "user", "content": "{q}"}}]}}\n' for q in QUESTIONS)
    )
    params = RepliesParams(questions=str(file), held_out=0, joined=2, max_tokens=5)
    backbone = SimpleNamespace(path="", torch_dtype=None, quantization="none", chat=None)
    run = SimpleNamespace(device="cpu", threads=1)

    def make(target: Path) -> list[Reply]:
        return make_replies(target, params, Table(), backbone, run)

    return tmp_path / "replies.jsonl", make


def test_replies_are_written_and_read_again(store, language_model):
    file, make = store
    replies = make(file)
    assert read_replies(file) == replies
    assert [r.request.messages[-1].text for r in replies[:3]] == QUESTIONS
    assert [r.request.row is None for r in replies] == [True] * 3 + [False] * 2
    for reply in replies:
        text = reply.request.messages[-1].text
        expected = generated(language_model, text, 5)
        assert list(reply.ids) == expected[: len(reply.ids)]
    for reply in replies[3:]:
        assert CAPTIONS[reply.request.row].removesuffix(".") in reply.request.messages[-1].text


@pytest.mark.parametrize("kept", [0, 1, 40, 400])
def test_a_killed_stage_goes_on_after_its_last_whole_line(store, monkeypatch, kept):
    file, make = store
    whole = make(file).copy()
    content = file.read_bytes()
    file.unlink()
    file.with_name("unfinished.jsonl").write_bytes(content[:kept])
    asked = []
    monkeypatch.setattr(
        reply_store,
        "answer",
        lambda model, part, count: asked.extend(part) or answer(model, part, count),
    )
    assert make(file) == whole
    assert file.read_bytes() == content
    assert len(asked) == len(whole) - content[:kept].count(b"\n")


# --- batches -----------------------------------------------------------------------------------


class Rows:
    """Stands in for the rows of the cache: 12 of them, in order, dealt to processes."""

    def __init__(self, sources: Any, *, batch_size: int, rank: int, world_size: int, **_: Any):
        self.batch_size, self.num_rows = batch_size, 12
        self._mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.epoch = self.step = 0

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Any:
        while self.step < len(self):
            rows = np.arange(self.step * self.batch_size, (self.step + 1) * self.batch_size)
            self.step += 1
            yield SimpleNamespace(rows=rows[self._mine], arrays={})
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


class Maker:
    """Rows whose vectors are their numbers."""

    sources: ClassVar[dict[str, Any]] = {}
    failed: ClassVar[set[int]] = set()

    def read(self, rows: list[int]) -> CaptionBatch:
        numbers = torch.tensor(rows, dtype=torch.float32)
        return CaptionBatch.from_lists(
            [[5]] * len(rows),
            numbers[:, None],
            numbers[:, None, None],
            torch.tensor(rows),
            9,
        )

    def usable(self, rows: list[int]) -> np.ndarray:
        return np.array([row for row in rows if row not in self.failed], np.int64)

    def make(self, rows: np.ndarray, arrays: Any) -> CaptionBatch:
        return self.read(rows.tolist())


class Captions:
    def captions(self, rows: np.ndarray) -> list[str]:
        return [f"ring {int(row)}." for row in rows]


MIX = {"asked": 4, "shown": 2, "told": 2, "joined": 2}


@pytest.fixture
def batches(monkeypatch, documents):
    monkeypatch.setattr(chat_batches, "ShuffledRows", Rows)
    replies = [Reply(question(f"q {n}"), (n + 5,), ended=True) for n in range(5)]
    replies += [Reply(Request(question(f"j {n}").messages, 20 + n), (9,), True) for n in range(3)]

    def make(rank: int = 0, world_size: int = 1, mix: Any = None, own: Any = replies) -> Any:
        return ChatBatches(
            Maker(),
            Captions(),
            documents,
            own,
            np.arange(12),
            mix or MIX,
            seed=0,
            rank=rank,
            world_size=world_size,
            reading=None,
        )

    return make


def take(source: Any, count: int) -> list[MixedBatch]:
    return list(itertools.islice(source, count))


def content(batch: MixedBatch) -> list[Any]:
    """Documents with the rows of their pictures in place of their numbers."""
    found = batch.documents
    assert found is not None
    assert torch.equal(found.pooled[:, 0].long(), found.rows)
    return [
        tuple(
            p if isinstance(p, Words) else (type(p).__name__, int(found.rows[p.picture]))
            for p in document
        )
        for document in found.documents
    ]


def test_every_step_has_its_share_of_each_stream(batches, language_model):
    said = language_model.tokenizer.decode
    met = []
    for batch in take(batches(), 5):
        own = content(batch)
        assert len(own) == len(batch) == 10
        last = [d[-1][0] if isinstance(d[-1], tuple) else d[-1].supervised for d in own]
        assert sorted(last[:6]) == ["Drawn"] * 4 + ["words"] * 2
        assert last[6:] == ["image_token"] * 2 + ["Drawn"] * 2
        for document in own[:6]:
            [(_, row)] = [p for p in document if isinstance(p, tuple)]
            text = "".join(said(p.ids) for p in document if isinstance(p, Words))
            assert f"ring {row}" in text
        met += [d[0].ids for d in own[6:8]]
    # Ten places of five questions: each twice.
    assert sorted(map(met.count, set(met))) == [2] * 5


def test_a_reply_whose_picture_has_no_features_is_left_out_and_counted(batches, monkeypatch):
    assert batches().num_left_out == 0
    monkeypatch.setattr(Maker, "failed", {21})
    source = batches()
    assert source.num_left_out == 1
    rows = {
        row
        for batch in take(source, 6)
        for document in content(batch)[8:]
        for _, row in [part for part in document if isinstance(part, tuple)]
    }
    assert rows == {20, 22}
    monkeypatch.setattr(Maker, "failed", {20, 21, 22})
    with pytest.raises(StageError, match="no reply serves it"):
        batches()


def test_batches_go_on_where_they_stood(batches):
    whole = [content(batch) for batch in take(batches(), 6)]
    source = batches()
    take(source, 3)
    state = source.state_dict()
    again = batches()
    again.load_state_dict(state)
    assert [content(batch) for batch in take(again, 3)] == whole[3:]
    assert [content(batch) for batch in take(source, 3)] == whole[3:]


def test_two_processes_share_the_batch_of_one(batches):
    alone = take(batches(), 3)
    parts = [take(batches(rank, 2), 3) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert len(parts[0][step]) == len(parts[1][step]) == 5
        both = content(parts[0][step]) + content(parts[1][step])
        assert sorted(map(str, both)) == sorted(map(str, content(batch)))


def test_shares_that_processes_cannot_have_and_replies_that_are_not_there_are_refused(batches):
    with pytest.raises(StageError, match=r"1 documents a step are told, which 2 processes"):
        batches(0, 2, {"asked": 4, "told": 1})
    with pytest.raises(StageError, match=r"training.mixture has joined, but no reply serves it"):
        batches(mix=MIX, own=[Reply(question("a"), (5,), True)])


# --- params ------------------------------------------------------------------------------------


def test_a_chat_model_has_a_mixture_of_its_own():
    plain, chat = (Params.model_validate({"model": {"turns": t}}) for t in ("plain", "chat"))
    assert plain.stream_shares == {"captions": 200}
    assert not plain.needs_replies
    assert chat.stream_shares == {"asked": 100, "shown": 38, "told": 50, "joined": 12}
    assert chat.needs_replies
    drawn = {"model": {"turns": "chat"}, "training": {"mixture": {"asked": 3, "shown": 1}}}
    assert not Params.model_validate(drawn).needs_replies


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training": {"mixture": {"told": 1}}}, "training.mixture: told is a stream of .*: chat"),
        (
            {"model": {"turns": "chat"}, "training": {"mixture": {"captions": 1, "asked": 1}}},
            "training.mixture: captions is a stream of model.turns: plain",
        ),
        (
            {"model": {"turns": "chat"}, "training": {"mixture": {"told": 1}}},
            "training.mixture: has no picture in a step",
        ),
        (
            {"model": {"turns": "chat"}, "training": {"replies": {"joined": 0}}},
            "replies.joined: 0, but training.mixture has joined",
        ),
        (
            {"model": {"turns": "chat"}, "run": {"shard_language_model": True}},
            "run.shard_language_model: does not go with model.turns: chat",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, line):
    with pytest.raises(ParamsError, match=line):
        parse_params(changes, Path("params.yaml"))
