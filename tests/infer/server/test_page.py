"""The chat page asks no other host, and talks in a browser as a person would have it."""

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.testclient import TestClient

from infer import server
from infer.server.app import Guard, create_app
from infer.server.errors import event
from infer.server.served import Served

PAGE = (Path(server.__file__).parent / "page.html").read_text(encoding="utf-8")


def test_page_names_no_other_host() -> None:
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(
                (tag, name) for name, _ in attrs if name in {"src", "srcset", "href", "action", "data", "poster"}
            )

    Links().feed(PAGE)
    assert not links
    assert not re.search(r"\b(?:https?|wss?):|\burl\(|@import|//\w+\.\w", PAGE)


def test_page_puts_no_html_together() -> None:
    """What a model says reaches the page as text."""
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", PAGE)


def test_page_is_served_with_its_policy() -> None:
    answer = TestClient(create_app(Served({}), api_keys=["secret"])).get("/")
    assert (answer.status_code, answer.text) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {"default-src": "'self' 'unsafe-inline'", "frame-ancestors": "'none'"}


# --- in a browser -----------------------------------------------------------------------------------------------------

MARKDOWN = """\
## Steps
1. **Read** the `<b>file</b>`:
   ```python
   print("<img src=x onerror=alert(1)>")
   ```
2. Then
   - one
   - two

Done & *well* <script>alert(1)</script>"""


class Listening:
    """An application that listens on a free port of this machine."""

    def __init__(self, app: FastAPI) -> None:
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *args: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)


def deltas_of(said: str) -> list[dict[str, Any]]:
    if said == "call":
        begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        parts = ['{"city": ', '"Paris"}']
        more = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts]
        return [{"reasoning_content": "I have to "}, {"reasoning_content": "look."}, {"tool_calls": [begun]}, *more]
    return [{"content": MARKDOWN[i : i + 7]} for i in range(0, len(MARKDOWN), 7)]


def canned(*keys: str) -> FastAPI:
    """A server of fixed answers, by what was said last: an error, a call, one without end, or Markdown."""
    app = FastAPI()
    app.add_middleware(Guard, api_keys=keys, max_body=2**20)
    app.state.asked, app.state.num_left = [], 0

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "canned"}, {"id": "other"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        app.state.asked.append(body)
        said = body["messages"][-1]["content"]

        async def events() -> AsyncIterator[str]:
            yield ": ping\n\n"
            try:
                while said == "endless":
                    yield event({"choices": [{"index": 0, "delta": {"content": "on "}, "finish_reason": None}]})
                    await asyncio.sleep(0.02)
            finally:
                app.state.num_left += said == "endless"
            for delta in deltas_of(said):
                yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                await asyncio.sleep(0.01)
            if said == "error":
                yield event({"error": {"message": "the engine broke.", "type": "server_error"}})
            elif said != "cut":
                yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                yield event("[DONE]")

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: chromium or google-chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, url: str, **options: Any) -> Any:
    """A page whose requests to other hosts, and whose errors, fail the test."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    page.wrong = []
    page.on("request", lambda request: request.url.startswith(url) or page.wrong.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept() if dialog.type == "confirm" else page.wrong.append(dialog.message))
    page.goto(url)
    return page


def wait_until(found: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_answers_are_shown(browser: Any, tmp_path: Path) -> None:
    """Markdown without its HTML, reasoning, calls and their results, settings, errors; on a phone, and in the dark."""
    app = canned()
    with Listening(app) as url:
        options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
        page = opened(browser, url, color_scheme="dark", **options)
        text, answers = (
            page.get_by_role("textbox", name="Message", exact=True),
            page.get_by_role("article", name="The model"),
        )

        unnamed = (
            "[...document.querySelectorAll('input, select, textarea')].filter(x => !x.labels.length && !x.ariaLabel)"
        )
        assert page.evaluate(f"{unnamed}.length") == 0
        page.get_by_role("button", name="Settings").click()
        page.locator("[name=model]").select_option("other")
        page.locator("[name=system]").fill("Be brief.")
        page.locator("[name=temperature]").fill("0.5")
        page.locator("[name=seed]").fill("7")
        page.locator("[name=thinking]").select_option("off")
        page.locator("[name=tools]").fill("[{")
        page.screenshot(path=tmp_path / "settings.png")
        page.get_by_role("button", name="Done").click()  # is not taken with tools that are no JSON
        tools = [{"type": "function", "function": {"name": "weather"}}]
        page.locator("[name=tools]").fill(json.dumps(tools))
        page.get_by_role("button", name="Done").click()

        text.fill("first line")
        text.press("Shift+Enter")
        text.type("second line")
        text.press("Enter")
        page.get_by_text("well", exact=True).wait_for()
        page.get_by_role("button", name="Retry").wait_for()
        wanted = {"model": "other", "stream": True, "temperature": 0.5, "seed": 7, "tools": tools}
        wanted["chat_template_kwargs"] = {"enable_thinking": False}
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first line\nsecond line"}]
        assert app.state.asked == [{"messages": said, **wanted}]
        answer = answers.last
        assert answer.locator("h3").text_content() == "Steps"
        assert answer.locator("ol > li > div > strong").text_content() == "Read"
        assert answer.locator("ol > li pre").text_content() == 'print("<img src=x onerror=alert(1)>")'
        assert answer.locator("ol > li > ul > li").all_text_contents() == ["one", "two"]
        assert answer.locator("p").text_content() == "Done & well <script>alert(1)</script>"
        assert answer.locator("script, img, b").count() == 0
        assert answer.get_by_role("button", name="Copy").count() == 1
        page.screenshot(path=tmp_path / "phone.png")

        text.fill("call")
        text.press("Enter")
        page.get_by_label("Result of weather").fill("12 °C")
        answer = answers.last
        assert answer.locator("legend").text_content() == "Calls weather"
        assert json.loads(answer.locator("fieldset pre").text_content()) == {"city": "Paris"}
        assert not answer.locator(".thought").is_visible()
        answer.get_by_text("Reasoning").click()
        assert answer.locator(".thought").text_content() == "I have to look."
        assert answer.locator(".thought").is_visible()
        page.screenshot(path=tmp_path / "call.png")
        page.get_by_role("button", name="Send results").click()
        wait_until(lambda: len(app.state.asked) == 3)
        page.get_by_role("button", name="Retry").wait_for()
        call, result = app.state.asked[-1]["messages"][-2:]
        assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
        assert result == {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"}

        for said, told in (("error", "The engine broke."), ("cut", "The connection to the server failed")):
            text.fill(said)
            text.press("Enter")
            page.get_by_role("alert").filter(has_text=told).wait_for()
        page.screenshot(path=tmp_path / "error.png")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        num_messages = page.locator("article").count()
        page.get_by_role("button", name="Retry").click()
        wait_until(lambda: len(app.state.asked) == 6)
        page.get_by_role("button", name="Retry").wait_for()
        assert page.locator("article").count() == num_messages
        page.reload()  # what was said is kept
        assert page.locator("article").count() == num_messages
        page.get_by_role("button", name="Clear").click()
        assert page.locator("article").count() == 0
        assert not page.wrong


@pytest.mark.slow
def test_key_and_stop(browser: Any, tmp_path: Path) -> None:
    """The key is asked for once and kept for the tab alone; Stop leaves the stream and keeps what it has said."""
    app = canned("secret")
    with Listening(app) as url:
        page = opened(browser, url, viewport={"width": 1100, "height": 700}, color_scheme="light")
        key = page.get_by_label("API key")
        for told in ("wrong", "secret"):
            page.get_by_role("alert").filter(has_text="API key").wait_for()
            key.fill(told)
            page.screenshot(path=tmp_path / "key.png")
            key.press("Enter")
        page.get_by_role("heading", name="canned").wait_for()
        assert not key.is_visible()
        page.get_by_role("textbox", name="Message", exact=True).fill("endless")
        page.get_by_role("button", name="Send").click()
        answer = page.get_by_role("article", name="The model")
        answer.filter(has_text="on on on").wait_for()
        page.screenshot(path=tmp_path / "streaming.png")
        assert app.state.num_left == 0
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        wait_until(lambda: app.state.num_left == 1)
        assert "on on on" in (answer.text_content() or "")
        page.get_by_role("textbox", name="Message", exact=True).fill("Markdown")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("heading", name="Steps").wait_for()
        page.get_by_role("button", name="Retry").wait_for()
        assert app.state.asked[-1]["messages"][1]["role"] == "assistant"
        page.screenshot(path=tmp_path / "desktop.png")
        page.reload()
        page.get_by_role("heading", name="canned").wait_for()
        assert not key.is_visible()
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert not page.wrong
