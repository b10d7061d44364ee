"""The page in headless Chromium, with the real server and a tiny model that knows its replies by heart."""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanochat.chat.conversation import Part
from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.chat import test_terminal
from tests.chat.test_terminal import LONG, SHAPE, SUM, learn_by_heart
from tests.conftest import REPO
from tests.tiny import WORDS, tiny_args, tiny_corpus, train_tiny

PAGE = (REPO / "nanochat/serve/page.html").read_text("utf-8")
HOSTILE = "<img src=x onerror=alert(1)> <|user_end|> <b>"
FAMILY = "\U0001f468\u200d\U0001f469 caf\u00e9 \u4f60"
TALK = {
    "hi": (Part("text", FAMILY),),
    SUM: (Part("python", "347+589"), Part("python_output", "936"), Part("text", "347 + 589 = 936.")),
    "long": (Part("text", LONG),),
    "bad": (Part("text", HOSTILE),),
}
# Each byte of a reply comes to the page in a read of its own, some thousands a second.
BYTE_BY_BYTE = """
const fetched = window.fetch;
window.fetch = async (...wanted) => {
  const response = await fetched(...wanted);
  const single = { async transform(chunk, out) {
    for (let i = 0; i < chunk.length; i++) {
      out.enqueue(chunk.slice(i, i + 1));
      if (i % 32 === 31) await new Promise((next) => setTimeout(next));
    }
  } };
  return new Response(response.body.pipeThrough(new TransformStream(single)), response);
};
"""
WATCH = """
window.seen = [];
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const reply = [...document.querySelectorAll(".reply")].at(-1)?.textContent ?? "";
  if (reply !== window.seen.at(-1)) window.seen.push(reply);
  if (reply.length > 20 && window.atTwenty) { const act = window.atTwenty; window.atTwenty = null; act(); }
}).observe(document, { subtree: true, childList: true, characterData: true }));
"""
SETTINGS = 'localStorage.setItem("nanochat:settings", JSON.stringify({ temperature: 0 }));'
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


def test_the_page_needs_nothing_and_trusts_no_text() -> None:
    """One file, without what a policy by hash would refuse, and without a way for text to become markup."""
    markup = re.sub(r"<(script|style)>.*?</\1>", "", PAGE, flags=re.DOTALL)
    assert PAGE.count("<script") == PAGE.count("<style") == 1
    assert not re.search(r"\s(on\w+|style|src)=", markup)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", PAGE.replace("// ", ""))
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "javascript:",
    ):
        assert way not in PAGE
    assert set(re.findall(r'request\("(.*?)"', PAGE)) == {"v1/models", "v1/chat/completions"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the run "chat", whose model has learnt TALK."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = Tokenizer.train([" ".join(WORDS) + "."] * 3, 340)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.setattr(test_terminal, "TALK", TALK)
        tiny_corpus(folder)
        tokenizer.save(files.tokenizer_dir("local"))
        train_tiny(**{**SHAPE, "run": "chat"})
        shape = planning.plan(tiny_args(**SHAPE), tokenizer.vocab_size).model
        model = GPT(
            shape, Precision(torch.float32, "sdpa"), tokenizer.bos_id if shape.document_mask else None
        )
        model.init_weights(0)
        learn_by_heart(model, tokenizer)
        checkpoint = files.checkpoints_dir("chat") / "step_000001"
        save_file(model.state_dict(), checkpoint / "model.safetensors")
        state = files.read_json(checkpoint / "state.json")
        state["plan"]["finetune"] = {"stage": "sft"}
        files.write_json(checkpoint / "state.json", state)
        manifest = files.read_json(checkpoint / "MANIFEST.json")
        for name in ("model.safetensors", "state.json"):
            path = checkpoint / name
            manifest["files"][name] |= {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        files.write_json(checkpoint / "MANIFEST.json", manifest)
    return folder / "base"


def serve(base: Path, *flags: str) -> Iterator[str]:
    """The address of a server of the run "chat", which ends with the test."""
    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.chat_web", "--run", "chat", "--port", str(port), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        process = subprocess.Popen(command, cwd=REPO)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server has ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[str]:
    yield from serve(base)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


class Tab:
    """A tab of the browser: what a person does in it, and what they see.

    Attributes:
        page: as Playwright has it.
        asked: the bodies of the requests for a reply.
        wrong: errors in the console, and what the policy has refused.
    """

    def __init__(self, page: Any) -> None:
        self.page, self.asked, self.wrong = page, list[Any](), list[str]()
        page.on(
            "request", lambda request: self.asked.append(request.post_data_json) if request.post_data else 0
        )
        page.on("console", lambda line: self.wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))

    def type(self, *keys: str) -> None:
        """Keys by their names; what is no name is typed letter by letter."""
        for key in keys:
            known = re.fullmatch(r"(Shift\+)?(Enter|Escape|Tab|ArrowUp)", key)
            (self.page.keyboard.press if known else self.page.keyboard.type)(key)

    def say(self, text: str) -> None:
        """Send a message and wait until the reply has ended."""
        self.type(text, "Enter")
        self.ended()

    def ended(self) -> None:
        self.page.wait_for_selector("#turns > li:last-child .foot button", timeout=30_000)

    def click(self, name: str) -> None:
        """Press the last button of this name."""
        self.page.get_by_role("button", name=name, exact=True).last.click()

    @property
    def messages(self) -> list[str]:
        return [str(text) for text in self.page.locator(".ask").all_text_contents()]

    @property
    def replies(self) -> list[str]:
        return [str(text) for text in self.page.locator(".reply").all_text_contents()]


def open_tab(browser: Any, address: str, *scripts: str, **options: Any) -> Tab:
    context = browser.new_context(**options)
    for script in (SETTINGS, *scripts):
        context.add_init_script(script)
    tab = Tab(context.new_page())
    tab.page.goto(address)
    tab.page.locator("#model", has_text=re.compile("^chat$")).wait_for()
    return tab


@pytest.fixture
def tab(browser: Any, served: str) -> Iterator[Tab]:
    """A tab with the page, in which nothing may go wrong."""
    tab = open_tab(browser, served, WATCH)
    yield tab
    tab.page.context.close()
    assert not tab.wrong


@pytest.mark.slow
def test_a_conversation_by_keyboard_alone(tab: Tab) -> None:
    tab.say(SUM)
    assert tab.page.locator(".reply code").all_text_contents() == ["347+589 = 936"]
    assert tab.replies == ["347+589 = 936347 + 589 = 936."]
    tab.say("hi")
    assert tab.replies[1] == FAMILY
    assert FAMILY in tab.page.get_by_role("status").text_content()
    sent = tab.asked[-1]["messages"]
    assert sent[0]["content"] == SUM
    assert sent[2]["content"] == "hi"
    assert [part["type"] for part in sent[1]["content"]] == ["python", "python_output", "text"]
    tab.type("two", "Shift+Enter", "lines")
    assert tab.page.get_by_label("Message").input_value() == "two\nlines"


@pytest.mark.slow
def test_a_reply_grows_until_it_is_stopped(browser: Any, served: str) -> None:
    tab = open_tab(browser, served, WATCH, BYTE_BY_BYTE)
    tab.say("long")
    grown = [text for text in tab.page.evaluate("window.seen") if text]
    assert len(grown) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    assert tab.replies == [LONG]
    escape = 'document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }))'
    for stop in (escape, 'document.getElementById("send").click()'):
        tab.page.evaluate(f"() => {{ window.atTwenty = () => {stop}; }}")
        tab.say("long")
        assert "Stopped." in tab.page.locator("#turns > li:last-child .foot").text_content()
        assert LONG.startswith(tab.replies[-1])
        assert 20 < len(tab.replies[-1]) < len(LONG)
    tab.say("hi")  # what was said before the stop is part of the conversation
    assert tab.asked[-1]["messages"][-2]["content"] == [{"type": "text", "text": tab.replies[-2]}]
    assert not tab.wrong
    tab.page.context.close()


@pytest.mark.slow
def test_edit_and_retry(tab: Tab) -> None:
    tab.say("long")
    tab.say(SUM)
    tab.click("Retry")
    tab.ended()
    assert tab.messages == ["long", SUM]
    assert tab.asked[-1] == tab.asked[-2]
    tab.type("ArrowUp")
    assert tab.page.get_by_label("Message").input_value() == SUM
    tab.type("Escape")
    assert tab.page.get_by_label("Message").input_value() == ""
    tab.click("Edit: long")
    assert tab.page.locator(".replaced").count() == 2
    tab.page.get_by_label("Message").fill("")
    tab.say("hi")
    assert tab.messages == ["hi"]
    assert tab.replies == [FAMILY]


@pytest.mark.slow
def test_a_reload_keeps_the_conversations(tab: Tab) -> None:
    tab.say("hi")
    tab.page.reload()
    assert tab.messages == ["hi"]
    assert tab.replies == [FAMILY]
    tab.click("New")
    assert tab.page.get_by_text("A small model").is_visible()
    assert not tab.messages
    tab.say(SUM)
    tab.click("History")
    tab.click("hi")
    assert tab.messages == ["hi"]
    tab.click("History")
    tab.click(f"Delete: {SUM}")
    tab.type("Escape")
    assert tab.page.evaluate("Object.keys(localStorage).filter((name) => name.includes('talk')).length") == 1


@pytest.mark.slow
def test_text_is_never_markup(tab: Tab) -> None:
    tab.say("bad")
    assert tab.replies == [HOSTILE]
    tab.say(HOSTILE)
    assert tab.messages[1] == HOSTILE
    assert tab.asked[-1]["messages"][-1]["content"] == HOSTILE
    tab.click("History")
    assert tab.page.locator("img, b, #turns script").count() == 0


@pytest.mark.slow
def test_characters_and_lines_that_come_in_pieces(browser: Any, served: str) -> None:
    tab = open_tab(browser, served, BYTE_BY_BYTE)
    tab.say("hi")
    tab.say(SUM)
    assert tab.replies == [FAMILY, "347+589 = 936347 + 589 = 936."]
    assert not tab.wrong
    tab.page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(browser: Any, served: str, scheme: str, tmp_path: Path) -> None:
    narrow = {"viewport": {"width": 320, "height": 568}, "color_scheme": scheme, "reduced_motion": "reduce"}
    tab = open_tab(browser, served, **narrow)
    assert tab.page.evaluate(FITS)
    tab.say("long " + "w" * 60)
    tab.say(SUM)
    assert tab.page.evaluate(FITS)
    for dialog in ("History", "Settings"):
        tab.click(dialog)
        assert tab.page.evaluate(FITS)
        assert tab.page.evaluate("document.querySelector('dialog[open]').scrollWidth <= 288")
        tab.type("Escape")
    paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 384) == (scheme == "light")
    tab.page.evaluate("document.querySelector('#turns > li').className = 'running'")
    dot = "getComputedStyle(document.querySelector('.running .reply'), '::after').animationName"
    assert tab.page.evaluate(dot) == "none"
    assert not tab.wrong
    tab.page.context.close()


@pytest.mark.slow
def test_the_policy_allows_the_page_alone(tab: Tab, served: str) -> None:
    with urllib.request.urlopen(served) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "sha256-" in policy
    assert "unsafe" not in policy
    add = """const script = document.createElement("script");
        script.textContent = "window.added = true"; document.body.append(script);"""
    tab.page.evaluate(f"() => {{ {add} }}")
    assert tab.page.evaluate("window.added") is None
    assert len(tab.wrong) == 1
    assert "Content Security Policy" in tab.wrong.pop()


@pytest.mark.slow
def test_a_server_that_is_away(browser: Any, served: str) -> None:
    tab = open_tab(browser, served)
    tab.page.context.set_offline(True)
    tab.say("hi")
    assert "does not answer" in tab.page.locator(".wrong").text_content()
    tab.page.context.set_offline(False)
    tab.click("Retry")
    ends = time.monotonic() + 20
    while tab.replies != [FAMILY]:
        assert time.monotonic() < ends, tab.replies
        tab.page.wait_for_timeout(20)
    assert not tab.page.locator(".wrong").text_content()
    tab.page.context.close()


@pytest.mark.slow
def test_a_conversation_longer_than_the_context(browser: Any, served: str) -> None:
    """The model is told the last turns that fit; the page keeps all, and says where the cut is."""
    tab = open_tab(browser, served)
    for _ in range(12):
        tab.say("long")
    assert len(tab.messages) == 12
    assert not tab.page.locator(".wrong:not(:empty)").count()
    assert "no longer reads" in tab.page.locator(".cut:not(:empty)").text_content()
    assert 1 < len(tab.asked[-1]["messages"]) < 23
    assert all("400" in line for line in tab.wrong)
    tab.page.context.close()


@pytest.mark.slow
def test_settings_and_system_text(tab: Tab) -> None:
    tab.click("Settings")
    tab.page.get_by_label("System text").fill("Be brief.")
    tab.page.get_by_label("Temperature").fill("0.25")
    tab.page.get_by_label("Tokens at most").fill("3")
    tab.page.get_by_label("Seed").fill("7")
    tab.click("Use")
    tab.page.get_by_label("Message", exact=True).focus()
    tab.say("long")
    sent = tab.asked[-1]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.25, 3, 7)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "Cut off" in tab.page.locator("#turns .foot").text_content()
    tab.click("Settings")
    tab.page.get_by_label("Temperature").fill("1.5")
    tab.type("Escape")
    tab.say("hi")
    assert tab.asked[-1]["temperature"] == 0.25


@pytest.fixture
def locked(base: Path, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "key").write_text("open-sesame\n", "utf-8")
    yield from serve(base, "--api-key-file", str(tmp_path / "key"))


@pytest.mark.slow
def test_a_server_with_a_key(browser: Any, locked: str) -> None:
    """The page asks for the key once, again after a wrong one, and not after a reload."""
    page = browser.new_context().new_page()
    keys = ["open-sesame", "wrong"]
    page.on("dialog", lambda dialog: dialog.accept(keys.pop()))
    for _ in range(2):
        page.goto(locked)
        page.locator("#model", has_text=re.compile("^chat$")).wait_for()
    assert not keys
    page.context.close()
