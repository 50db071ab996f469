"""The annotation page in a real browser: two annotators, ten prompts, a reload, a dead server."""

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the pages need the extra `app`: pip install .[app]")

import uvicorn
from fastapi.testclient import TestClient
from test_annotations import write_study

from app.annotate import create_app, export
from app.annotations import Annotations, generated_side
from corpora.parti_prompts import fleiss_kappa, percent_agreement, read_votes

# What the annotators mean, per prompt: relevance and realism.
ADA = [("gen", "ret"), ("ret", "ret"), ("same", "gen"), ("gen", "same"), ("ret", "gen")] * 2
BO = [("gen", "gen"), ("same", "ret"), ("ret", "gen"), ("gen", "same"), ("gen", "ret")] * 2


class _Server:
    """The page on a free port of this machine, which can be stopped and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.annotations = Annotations(self.folder)
        app = create_app(self.annotations)
        config = uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        for _ in range(500):
            if self._server.started:
                return
            time.sleep(0.02)
        raise RuntimeError("the server did not start")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.annotations.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    running = _Server(write_study(tmp_path))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def _choice(name: str, pair: int, vote: str) -> str:
    generated = generated_side(name, f'prompt "{pair}" & <more>')
    return {"gen": generated, "ret": "B" if generated == "A" else "A", "same": "same"}[vote]


def _open(browser: Any, server: _Server, name: str) -> Any:
    page = browser.new_context().new_page()
    page.set_default_timeout(10_000)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.fill("#name", name)
    page.click("#name-form button")
    _at(page, 0)
    return page


def _at(page: Any, pair: int) -> None:
    page.wait_for_selector(f"#work[data-pair='{pair}']")
    assert page.inner_text("#prompt") == f'prompt "{pair}" & <more>'


def _click(page: Any, question: str, choice: str) -> None:
    page.click(f"[data-question={question}] button[data-choice={choice}]")


def _pressed(page: Any, question: str) -> list[str]:
    buttons = page.query_selector_all(f"[data-question={question}] button[aria-pressed=true]")
    return [button.get_attribute("data-choice") for button in buttons]


def _dominant_colour(page: Any, side: str) -> str:
    """Which colour the browser really shows: red is generated, blue retrieved."""
    return page.evaluate(
        """async (side) => {
            const picture = document.querySelector("#picture-" + side);
            await picture.decode();
            const canvas = document.createElement("canvas");
            const context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            const [red, , blue] = context.getImageData(1, 1, 1, 1).data;
            return red > blue ? "gen" : "ret";
        }""",
        side,
    )


def test_two_annotators_a_reload_and_a_dead_server(
    browser: Any, server: _Server, tmp_path: Path
) -> None:
    keys = {"A": "1", "same": "2", "B": "3"}
    ada = _open(browser, server, "Ada")
    for pair in range(5):  # with the keyboard alone
        _at(ada, pair)
        for question, vote in zip(("relevant", "realistic"), ADA[pair]):
            assert ada.get_attribute(f"[data-question={question}]", "class") == "active"
            ada.keyboard.press(keys[_choice("Ada", pair, vote)])
    _at(ada, 5)
    _click(ada, "relevant", _choice("Ada", 5, ADA[5][0]))
    ada.wait_for_function("document.querySelector('#status').textContent === 'saved'")

    bo = _open(browser, server, "Bo")  # meanwhile, with the mouse
    for pair in range(10):
        _at(bo, pair)
        assert _dominant_colour(bo, generated_side("Bo", f'prompt "{pair}" & <more>')) == "gen"
        for question, vote in zip(("relevant", "realistic"), BO[pair]):
            _click(bo, question, _choice("Bo", pair, vote))
    bo.wait_for_function("document.querySelector('#status').textContent.startsWith('That was')")

    ada.reload()
    _at(ada, 5)
    assert _pressed(ada, "relevant") == [_choice("Ada", 5, ADA[5][0])]
    assert _pressed(ada, "realistic") == []

    server.stop()  # an answer given to a dead server is kept and sent when it is back
    _click(ada, "realistic", _choice("Ada", 5, ADA[5][1]))
    ada.wait_for_selector("#status.trouble")
    server.start()
    ada.wait_for_function("document.querySelector('#status').textContent === 'saved'")
    ada.reload()
    _at(ada, 5)
    assert _pressed(ada, "realistic") == [_choice("Ada", 5, ADA[5][1])]
    ada.click("#next")
    for pair in range(6, 10):
        _at(ada, pair)
        for question, vote in zip(("relevant", "realistic"), ADA[pair]):
            _click(ada, question, _choice("Ada", pair, vote))
    ada.wait_for_function("document.querySelector('#status').textContent.startsWith('That was')")

    # Going back and changing one's mind, once.
    ada.keyboard.press("ArrowLeft")
    _at(ada, 8)
    assert _pressed(ada, "relevant") == [_choice("Ada", 8, ADA[8][0])]
    _click(ada, "relevant", "same")
    ada.wait_for_function("document.querySelector('#status').textContent === 'saved'")
    meant = [list(votes) for votes in ADA]
    meant[8][0] = "same"

    summary = export(server.annotations, tmp_path / "out")
    for column, question in enumerate(("relevant", "realistic")):
        lines = (tmp_path / "out" / f"{question}.tsv").read_text().split("\n")
        cells = [line.split("\t") for line in lines]
        assert cells[0] == ["Prompt", "Category", "Challenge", "Note", "Decisions"]
        for pair in range(10):
            assert cells[pair + 1] == [
                f'prompt "{pair}" & <more>',
                "Animals",
                "Basic",
                f"note {pair}",
                f"{meant[pair][column]},{BO[pair][column]}",
            ]
        assert cells[11:] == [[""]]
        votes = [row.votes for row in read_votes(tmp_path / "out" / f"{question}.tsv")]
        agreement = (
            f"{100 * percent_agreement(votes):.1f} %, Fleiss' kappa {fleiss_kappa(votes):.3f}"
        )
        assert agreement in summary
    assert "Ada: 10 of 10 pairs" in summary


def test_the_page_names_nothing_outside_itself() -> None:
    page = (Path(__file__).parents[1] / "app" / "templates" / "annotate.html").read_text()
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"// .*", "", page))


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(create_app(Annotations(write_study(tmp_path))), "http://127.0.0.1")


def test_bad_requests_are_answered_with_a_reason(client: TestClient) -> None:
    good = {"annotator": "Ada", "pair": 0, "question": "relevant", "choice": "A"}
    assert client.put("/answers", json=good).json() == {"done": 0, "total": 10, "resume": 0}
    answer = client.put("/answers", json={**good, "pair": 77})
    assert (answer.status_code, answer.json()["detail"]) == (
        400,
        "there is no pair 77; the study has 10",
    )
    assert client.put("/answers", json={**good, "annotator": " "}).status_code == 400
    assert client.put("/answers", json={**good, "choice": "gen"}).status_code == 422
    assert client.put("/answers", json={**good, "vote": "gen"}).status_code == 422
    for path in ("/pairs/10", "/pairs/-1", "/pairs/99/A"):
        assert client.get(path, params={"annotator": "Ada"}).status_code == 400
    assert client.get("/pairs/0/C", params={"annotator": "Ada"}).status_code == 422


def test_pictures_do_not_tell_where_they_come_from(client: TestClient, tmp_path: Path) -> None:
    for side in ("A", "B"):
        answer = client.get(f"/pairs/0/{side}", params={"annotator": "Ada"})
        assert answer.headers["content-type"] == "image/png"
        assert not re.search("ret|gen", str(answer.headers))
    shown = client.get("/pairs/0", params={"annotator": "Ada"}).text
    assert "png" not in shown


def test_other_host_names_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "attacker.example"}).status_code == 400
    assert "Two pictures" in client.get("/").text


def test_pages_elsewhere_neither_answer_nor_look(client: TestClient) -> None:
    good = {"annotator": "Ada", "pair": 0, "question": "relevant", "choice": "A"}
    for headers in (
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ):
        for answer in (
            client.put("/answers", json=good, headers=headers),
            client.get("/pairs/0/A?annotator=Ada", headers=headers),
            client.get("/", headers=headers),
        ):
            assert answer.status_code == 403
            assert "are refused" in answer.json()["detail"]
    assert client.get("/progress?annotator=Ada").json()["done"] == 0
    own = {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
    assert client.put("/answers", json=good, headers=own).status_code == 200
