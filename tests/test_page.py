"""The web page: driven in a browser over the miniature's weights; its parts without one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra `app`: pip install .[app]")

import gradio as gr

from app.annotations import AnnotationError, read_pairs
from app.page.annotation_tab import AnnotationRoutes, write_study
from app.page.cache_tab import Browser
from app.page.page import create_app
from app.page.visitor_talks import VisitorTalks
from app.serving.knobs import Knobs
from app.serving.worker import Worker
from app.transcript import Exchange, Piece, to_html, to_json, to_page
from gill.artifacts import Artifacts
from gill.loading import Gill
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import GeneratedImage, ReplySettings, RetrievedImage, Text
from pipeline.talking.decoding import DecodingSettings
from tests.test_end_to_end import world  # noqa: F401 - a fixture
from tests.told_service import Server

FAST = ReplySettings(
    generation=GenerationSettings(steps=2, guidance=2.0), decoding=DecodingSettings(max_tokens=6)
)


@pytest.fixture(scope="module")
def gill(world: Path) -> Iterator[Gill]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        yield Gill.load("artifacts")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(gill: Gill) -> Iterator[Server]:
    # The first generated picture is fast; the test that stops one asks for many steps itself.
    running = Server(create_app(gill, Artifacts(Path("artifacts")), settings=FAST))
    yield running
    running.stop()


def _open(browser: Any, server: Server, width: int) -> tuple[Any, list[str]]:
    page = browser.new_context(viewport={"width": width, "height": 850}).new_page()
    page.set_default_timeout(30_000)
    outside: list[str] = []
    own = (server.url, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    page.goto(server.url)
    page.wait_for_selector("#box textarea")
    return page, outside


def _kinds(page: Any) -> list[str]:
    return [
        figure.get_attribute("class") for figure in page.query_selector_all("#said .model figure")
    ]


def test_a_conversation_in_the_browser(browser: Any, server: Server, tmp_path: Path) -> None:
    page, outside = _open(browser, server, 1280)
    page.set_input_files("#box input[type=file]", "artifacts/miniature/images/test/000000.png")
    page.wait_for_selector("#box img")
    page.get_by_role("radio", name="retrieve").check()
    page.fill("#box textarea", "show <b>me</b> a red ring.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#said .model figure.retrieved img")
    asked = page.inner_text("#said .user")
    assert "show <b>me</b> a red ring." in asked
    assert page.query_selector("#said .user img")
    first = page.inner_text("#said figcaption")
    assert re.match(r"retrieved · score -?\d\.\d{3} · .*\.png", first)

    page.wait_for_selector("#again:not([disabled])")
    page.click("#again")  # another candidate
    page.wait_for_function(
        "old => document.querySelector('#said figcaption')?.innerText !== old"
        " && document.querySelector('#said .retrieved')",
        arg=first,
    )
    page.wait_for_selector("#other:not([disabled])")
    assert page.inner_text("#other") == "Generate instead"
    page.click("#other")
    page.wait_for_selector("#said .model figure.generated img")
    assert "generated · seed" in page.inner_text("#said figcaption")
    assert "2 steps" in page.inner_text("#said figcaption")
    page.wait_for_selector("#other:has-text('Retrieve instead'):not([disabled])")
    assert _kinds(page) == ["generated"]
    made = page.inner_text("#said figcaption")
    page.click("#again")  # another picture of that kind
    page.wait_for_function(
        "old => document.querySelector('#said .generated figcaption')?.innerText"
        ".startsWith('generated') && document.querySelector('#said figcaption').innerText !== old",
        arg=made,
    )
    page.wait_for_selector("#other:has-text('Retrieve instead'):not([disabled])")
    assert _kinds(page) == ["generated"]
    assert page.query_selector("h1").inner_text() == "GILL"
    page.wait_for_selector("#box .stop-button", state="detached")  # nothing runs

    made = page.inner_text("#said")
    page.reload()
    page.wait_for_selector("#said .user")
    assert page.inner_text("#said") == made

    page.get_by_role("radio", name="text", exact=True).check()
    page.fill("#box textarea", "it turns blue.")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#said .user').length === 2")
    page.wait_for_selector("#again:not([disabled])")

    saved = {}
    for kind in ("html", "json"):
        with page.expect_download() as download:
            page.click(f"#save-{kind}")
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64', saved["html"])) == 2
    assert "show &lt;b&gt;me&lt;/b&gt; a red ring." in saved["html"]
    assert not re.findall(r"(?:src|href)=.(?!data:)", saved["html"])
    exchanges = json.loads(saved["json"])["exchanges"]
    assert [one["kind"] for one in exchanges[0]["turn"]] == ["picture", "text"]
    generated = [one for one in exchanges[0]["answer"] if one["kind"] == "generated"]
    assert generated[0]["steps"] == 2
    assert generated[0]["picture"].startswith("data:image/png;base64,")
    assert exchanges[1]["settings"]["want"] == "text"

    page.click("#fresh")
    page.wait_for_selector("#hello")
    assert outside == []


def test_a_picture_that_takes_long_can_be_stopped(browser: Any, server: Server) -> None:
    page, _ = _open(browser, server, 1280)
    page.get_by_role("radio", name="generate").check()
    page.get_by_role("button", name="Generation").click()
    page.get_by_label("steps").fill("900")
    page.fill("#box textarea", "a ring")
    page.keyboard.press("Enter")
    # Asked in the page itself: every step replaces the line, perhaps before it was looked at.
    page.wait_for_function(
        "document.querySelector('#said .working')?.innerText.includes('drawing …')"
    )
    # At once: a click waits until the button stands still, and by then the picture may be done.
    page.dispatch_event("#box .stop-button", "click")
    page.wait_for_selector("#said .problem:has-text('stopped')")


def test_the_cache_in_the_browser_and_the_page_on_a_phone(browser: Any, server: Server) -> None:
    page, outside = _open(browser, server, 390)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 390
    page.get_by_role("tab", name="Cache").click()
    page.fill("#cache-text textarea, #cache-text input", "a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cache-tiles img")
    page.click("#cache-tiles button.thumbnail-item >> nth=0")
    page.wait_for_selector("#cache-about table")
    facts = page.inner_text("#cache-about")
    assert "caption" in facts
    assert "norm of pooled" in facts
    assert page.evaluate(width) <= 390
    assert outside == []


def _exchange() -> Exchange:
    exchange = Exchange([Piece(text="<script>alert(1)</script>")], FAST)
    exchange.add(Text("one"))
    exchange.add(Text(" two"))
    picture = Image.new("RGB", (8, 8), "red")
    exchange.add(RetrievedImage(picture, 3, 0.25, "a/<x>.png", "a & b", 0.125))
    exchange.add(GeneratedImage(picture.resize((600, 300)), 5, 9, 2.5))
    return exchange


def test_transcripts_say_everything_and_run_nothing() -> None:
    html = to_html([_exchange()])
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<p>one two</p>" in html
    assert "retrieved · score 0.250 · a/&lt;x&gt;.png" in html
    assert "“a &amp; b” · p(generate) = 0.12" in html
    assert "generated · seed 5 · 9 steps" in html
    page = to_page([_exchange()])
    assert "default-src 'none'" in page
    assert html.strip() in page
    [told] = json.loads(to_json([_exchange()]))["exchanges"]
    assert told["answer"][0] == {"kind": "text", "text": "one two"}
    assert told["answer"][1]["source"] == "a/<x>.png"
    assert told["answer"][1]["row"] == 3
    assert (told["answer"][2]["seed"], told["answer"][2]["guidance"]) == (5, 2.5)
    assert ReplySettings.model_validate(told["settings"]) == FAST


def test_knobs_are_the_settings() -> None:
    with gr.Blocks():
        knobs = Knobs(FAST)
    labels = [field.label for field in knobs.fields]  # type: ignore[attr-defined]
    assert labels[:2] == ["want", "seed"]
    values = [field.value for field in knobs.fields]  # type: ignore[attr-defined]
    assert knobs.settings(values) == FAST
    values[labels.index("steps")] = 30.0
    values[labels.index("top k")] = 5
    values[0] = "retrieve"
    changed = knobs.settings(values)
    assert changed.generation is not None
    assert (changed.want, changed.generation.steps, changed.decoding.top_k) == ("retrieve", 30, 5)
    values[labels.index("top p")] = 7
    with pytest.raises(ValueError, match="top_p"):
        knobs.settings(values)


def test_a_fork_answers_like_the_original_and_apart_from_it(gill: Gill) -> None:
    original = gill.conversation()
    original.reply(["a red ring."], FAST)
    twin = original.fork()
    assert twin.speaker is original.speaker
    said = original.reply(["it turns blue."], FAST)
    assert original.num_turns == 2
    assert twin.num_turns == 1
    again = twin.reply(["it turns blue."], FAST)
    assert again.text == said.text
    assert [one.picture.tobytes() for one in again.images] == [
        one.picture.tobytes() for one in said.images
    ]


def test_the_cache_is_found_by_words_and_by_picture(gill: Gill) -> None:
    browser = Browser(gill, Artifacts(Path("artifacts")))
    assert "features.zarr" in browser.names
    table = browser.table("features.zarr", browser.store("features.zarr").num_rows)
    assert table is not None
    word = table[0].caption.rstrip(".").split()[-1]
    rows = browser.by_caption("features.zarr", word)
    expected = [row for row in range(len(table)) if word in table[row].caption][: len(rows)]
    assert rows == expected
    with Image.open(str(table[4].image)) as picture:
        nearest = browser.by_picture("features.zarr", picture.convert("RGB"))
    assert nearest[0][1] == pytest.approx(1, abs=1e-3)
    same = {row for row in range(len(table)) if table[row].image == table[4].image}
    assert nearest[0][0] in same
    html, neighbours = browser.describe_row("features.zarr", 4)
    assert table[4].caption in html
    assert 4 not in [row for row, _ in neighbours]
    assert "pooled vector before the projection" in browser.provenance("features.zarr")
    with pytest.raises(ValueError, match="no store"):
        browser.store("../model")
    with pytest.raises(ValueError, match="rows 0 to"):
        browser.describe_row("features.zarr", 10**9)


def test_a_study_is_drawn_and_served(gill: Gill, tmp_path: Path) -> None:
    artifacts = Artifacts(Path("artifacts"))
    worker = Worker()
    routes = AnnotationRoutes(artifacts, gill, worker, ["127.0.0.1"])
    routes.folder = tmp_path / "annotation"
    done: list[tuple[int, int]] = []
    with pytest.raises(AnnotationError):
        routes.open()
    write_study(routes, 2, lambda *progress: done.append(progress))
    worker.close()
    assert done == [(1, 2), (2, 2)]
    pairs = read_pairs(routes.folder)
    assert len({pair.prompt for pair in pairs}) == 2
    for pair in pairs:
        with Image.open(routes.folder / pair.generated) as made:
            assert made.size == (64, 64)
    routes.open()

    server = Server(routes)
    try:
        assert "Two pictures" in httpx.get(f"{server.url}/annotate").text
        shown = httpx.get(f"{server.url}/pairs/0?annotator=Ada").json()
        assert shown["prompt"] == pairs[0].prompt
        picture = httpx.get(f"{server.url}/pairs/0/A?annotator=Ada")
        assert picture.headers["content-type"] == "image/png"
    finally:
        server.stop()


def test_other_host_names_are_refused(server: Server) -> None:
    assert httpx.get(server.url, headers={"Host": "attacker.example"}).status_code == 400
    assert httpx.get(server.url).status_code == 200


def test_the_last_talk_of_a_visitor_is_kept_for_a_while() -> None:
    now = [0.0]
    talks: VisitorTalks[str] = VisitorTalks(10, most=2, clock=lambda: now[0])
    for visitor in ("a", "b", "a", "c"):
        talks.keep(visitor, f"{visitor} talks")
    assert [talks.of(visitor) for visitor in "abcd"] == ["a talks", None, "c talks", None]
    talks.forget("a")
    assert talks.of("a") is None
    now[0] = 10
    assert talks.of("c") is None
