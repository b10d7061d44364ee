"""The server over real sockets, with a small random model: the official client, hostile ones, full load."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.chat import conversation
from nanochat.chat.replies import ReplyEngine
from nanochat.common import listener
from nanochat.common.errors import UserError
from nanochat.config.arguments import ChatWebArgs
from nanochat.engine import Engine, Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer
from scripts import chat_web
from tests.chat.test_replies import CALLS, TEXTS, random_gpt
from tests.conftest import REPO
from tests.tiny import trained_base

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the official client is not installed")
from nanochat.serve import server as serving  # noqa: E402
from nanochat.serve.openai_api import Served  # noqa: E402

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 347 + 589?"}]}
GREEDY: dict[str, Any] = {**HI, "temperature": 0, "max_tokens": 60}
JSON = {"Content-Type": "application/json"}


class Running:
    """A server in a thread of the test.

    Attributes:
        port: at 127.0.0.1.
        client: the official one.
        server: the application's object.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, key: str, limits: dict[str, Any]) -> None:
        args = ChatWebArgs(run="tiny", **limits)
        served = Served("tiny", tokenizer, model.config.sequence_len, args.slots, args.max_messages)
        self.server = serving.Server(served, [model], args, key)
        self.listener = listener.bind("127.0.0.1", 0)
        self.listener.listen(256)
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            self.server.app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1
        )
        self.http = uvicorn.Server(config)
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=60)

    def request(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = (JSON if raw is not None else {}) | (headers or {})
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, given)
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return (answer.status, *told)

    def begin(self, body: Any, path: str = "/v1/completions") -> socket.socket:
        """A connection on which a request has been sent."""
        raw, connection = json.dumps(body).encode(), socket.create_connection(("127.0.0.1", self.port), 60)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection

    def health(self) -> dict[str, Any]:
        """What /health says."""
        status, _, raw = self.request("/health")
        assert status == 200
        return json.loads(raw)

    def wait(self, seconds: float = 20, **state: int) -> None:
        """Wait until /health says this."""
        ends = time.monotonic() + seconds
        while {name: self.health()[name] for name in state} != state:
            assert time.monotonic() < ends, f"{self.health()}, expected {state}"
            time.sleep(0.005)


@contextlib.contextmanager
def running(model: GPT, tokenizer: Tokenizer, key: str = "", **limits: Any) -> Iterator[Running]:
    """A server that ends with the block."""
    it = Running(model, tokenizer, key, limits)
    thread = threading.Thread(target=it.http.run, args=([it.listener],))
    thread.start()
    try:
        while not it.http.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield it
    finally:
        it.client.close()
        it.http.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not any(device.thread.is_alive() for device in it.server._devices)


@pytest.fixture(scope="module", autouse=True)
def page() -> None:
    if not (REPO / "nanochat/serve/page.html").exists():
        pytest.skip("nanochat/serve/page.html is not there")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return random_gpt(tokenizer, favour=CALLS, seed=4)


@pytest.fixture(scope="module")
def here(model: GPT, tokenizer: Tokenizer) -> Iterator[Running]:
    with running(model, tokenizer, slots=4) as it:
        yield it


@contextlib.contextmanager
def slowed(model: GPT, seconds: float) -> Iterator[None]:
    """Every pass of the model takes so long, at least."""
    hook = model.blocks[-1].register_forward_pre_hook(lambda *_: time.sleep(seconds))
    yield
    hook.remove()


LONG: dict[str, Any] = {"prompt": "What", "temperature": 0, "max_tokens": 150}


def expected_reply(model: GPT, tokenizer: Tokenizer, messages: list[Any]) -> tuple[conversation.Part, ...]:
    """The greedy reply of the engine that the terminal has."""
    said = conversation.read_prompt({"messages": messages}, "here")
    prompt = conversation.prompt(tokenizer, said)
    [[reply]] = ReplyEngine(model, tokenizer).replies([prompt], Sampling(60, temperature=0))
    return conversation.parts_of(tokenizer, reply.ids)


# ---------------------------------------------------------------------------------------------------------
# The official client


def test_the_official_client_gets_the_reply_that_the_terminal_gets(
    here: Running, model: GPT, tokenizer: Tokenizer
) -> None:
    """In one piece and streamed, with calls; and again with the answer sent back."""
    create, messages = here.client.chat.completions.create, list(HI["messages"])
    for _ in range(2):
        wanted = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 60}
        parts = [
            {"type": kind.kind, "text": kind.text} for kind in expected_reply(model, tokenizer, messages)
        ]
        assert {part["type"] for part in parts} >= {"python", "python_output"}
        answer = create(**wanted)
        message = answer.choices[0].message
        assert (answer.object, answer.model, message.role) == ("chat.completion", "tiny", "assistant")
        assert message.parts == parts
        assert message.content == "".join(part["text"] for part in parts if part["type"] == "text")
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        said: list[conversation.Part] = []
        *chunks, usage = create(**wanted, stream=True, stream_options={"include_usage": True})
        assert chunks[0].choices[0].delta.role == "assistant"
        for chunk in chunks[1:-1]:
            delta = chunk.choices[0].delta
            part = getattr(delta, "part", None) or {"type": "text", "text": delta.content}
            said.append(conversation.Part(part["type"], part["text"]))
        joined = conversation.joined(said)
        assert [{"type": part.kind, "text": part.text} for part in joined] == parts
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
        assert (usage.choices, usage.usage) == ([], answer.usage)
        sent = {"role": "assistant", "content": message.parts}
        messages += [sent, {"role": "user", "content": "and 1 + 1?"}]


def test_seeds_stops_and_several_choices(here: Running) -> None:
    create = here.client.chat.completions.create
    wanted = {"model": "tiny", "messages": HI["messages"], "max_tokens": 30, "temperature": 1.0}
    first, again = (create(**wanted, n=3, seed=5) for _ in range(2))
    contents = [choice.message.parts for choice in first.choices]
    assert contents == [choice.message.parts for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert contents[0] != contents[1]
    chunks = list(create(**wanted, n=3, seed=5, stream=True))
    ends = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(ends) == [0, 1, 2]
    text = here.client.completions.create(model="tiny", prompt="What", temperature=0, max_tokens=40)
    whole = text.choices[0].text
    stop = whole[10:13]
    cut = here.client.completions.create(
        model="tiny", prompt="What", temperature=0, max_tokens=40, stop=["never there", stop]
    )
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < text.usage.completion_tokens == 40
    here.wait(busy=0, queue=0)


def test_texts_are_continued_as_by_the_engine(here: Running, model: GPT, tokenizer: Tokenizer) -> None:
    prompts = ["What is", "caf\u00e9 \U0001f40d"]
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    done = Engine(model, tokenizer).generate(ids, Sampling(16, temperature=0.8, top_k=20, seed=3), 2)
    expected = [_text(tokenizer, one.ids) for two in done for one in two]
    answer = here.client.completions.create(
        model="tiny", prompt=prompts, n=2, temperature=0.8, seed=3, extra_body={"top_k": 20}
    )
    assert [choice.text for choice in answer.choices] == expected
    model_told = here.client.models.list().data[0].model_dump()
    expected_fields = {"id": "tiny", "object": "model", "owned_by": "nanochat", "context": 192}
    assert model_told.items() >= expected_fields.items()


def _text(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    """Text without special tokens, over which no character reaches."""
    runs = itertools.groupby(ids, lambda token: token < tokenizer.bos_id)
    return "".join(tokenizer.decode(list(run)) for is_text, run in runs if is_text)


def test_errors_are_those_that_the_client_knows(here: Running) -> None:
    create = here.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        create(model="gpt-4", messages=HI["messages"])
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", messages=[{"role": "user", "content": "What is " * 200}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", messages=HI["messages"], tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"


# ---------------------------------------------------------------------------------------------------------
# Bytes


def test_a_stream_read_byte_by_byte(here: Running) -> None:
    with here.begin(
        {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}, "/v1/chat/completions"
    ) as connection:
        raw = bytearray()
        while not raw.endswith(b"0\r\n\r\n"):
            assert (byte := connection.recv(1)), raw
            raw += byte
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-type: text/event-stream" in head.lower()
    assert body.isascii()
    text = re.sub(rb"\r\n0\r\n\r\n$|\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", body).decode()
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"]["completion_tokens"] <= 60
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")


def test_silence_is_filled_and_time_is_bounded(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SILENCE_S", 0.05)
    with running(model, tokenizer, slots=1, max_seconds=0.5) as it, slowed(model, 0.02):
        first = it.begin(LONG)
        it.wait(busy=1)
        status, _, raw = it.request("/v1/completions", {**LONG, "stream": True})
        assert status == 200
        assert raw.startswith(b": \n\n: \n\n")
        answer = http.client.HTTPResponse(first)
        answer.begin()
        choice = json.loads(answer.read())["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["text"]
        first.close()


# ---------------------------------------------------------------------------------------------------------
# Who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "192.168.0.9"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
def test_another_site_and_another_name_are_refused(
    here: Running, headers: dict[str, str], status: int
) -> None:
    got, told, raw = here.request("/v1/completions", {**LONG, "max_tokens": 1}, headers)
    assert got == status
    assert not any(name.startswith("access-control") for name in told)
    assert told["x-content-type-options"] == "nosniff"
    assert ("error" in json.loads(raw)) == (status != 200)


def test_no_site_is_let_in_by_default(here: Running) -> None:
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    status, told, _ = here.request("/v1/completions", headers=asks, method="OPTIONS")
    assert status == 403
    assert not any(name.startswith("access-control") for name in told)


def test_a_key_is_wanted_where_there_is_one(model: GPT, tokenizer: Tokenizer) -> None:
    with running(model, tokenizer, key="secret", allow_origin=("https://friend.example",)) as it:
        assert it.client.models.list().data[0].id == "tiny"
        for path, open_to_all in (("/", True), ("/health", True), ("/v1/models", False), ("/metrics", False)):
            for given in ("", "Bearer wrong", "Bearer secret2", "Bearer secr\u00e9t", "secret"):
                status, told, _ = it.request(path, headers={"Authorization": given} if given else {})
                assert status == (200 if open_to_all else 401)
                assert ("www-authenticate" in told) is not open_to_all
        right = {"Authorization": "Bearer secret"}
        status, told, _ = it.request("/v1/models", headers={**right, "Origin": "https://friend.example"})
        assert (status, told["access-control-allow-origin"]) == (200, "https://friend.example")
        status, told, _ = it.request("/v1/models", headers={**right, "Origin": "https://other.example"})
        assert status == 403
        assert "access-control-allow-origin" not in told
        asks = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        status, told, _ = it.request(
            "/v1/completions", headers={"Origin": "https://friend.example", **asks}, method="OPTIONS"
        )
        assert (status, told["access-control-allow-origin"]) == (200, "https://friend.example")


def test_the_page_may_run_its_own_script_and_nothing_else(here: Running) -> None:
    status, told, raw = here.request("/")
    assert (status, told["content-type"]) == (200, "text/html; charset=utf-8")
    assert raw == (REPO / "nanochat/serve/page.html").read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in told["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        inner = raw.decode().split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_paths_methods_and_sizes(here: Running) -> None:
    for path, body, status in (
        ("/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/v1/models", {}, 405),
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/completions", b'{"prompt": "a", "prompt": "b"}', 400),
        ("/v1/completions", b"[" * 10_000, 400),
        ("/v1/completions", b" " * (2**20 + 1), 413),
    ):
        got, _, raw = here.request(path, body)
        assert got == status, path
        assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}


# ---------------------------------------------------------------------------------------------------------
# Load


@pytest.mark.slow
def test_who_comes_when_the_queue_is_full_is_told_at_once(model: GPT, tokenizer: Tokenizer) -> None:
    """With the usual queue of 64, and /health stays quick."""
    with running(model, tokenizer, slots=2) as it, slowed(model, 0.01):
        waiting = [it.begin({**LONG, "stream": index % 2 == 0}) for index in range(2)]
        it.wait(busy=2, queue=0)
        waiting += [it.begin({**LONG, "stream": index % 2 == 0}) for index in range(64)]
        it.wait(busy=2, queue=64)
        times = []
        for _ in range(20):
            began = time.monotonic()
            status, told, raw = it.request("/v1/completions", LONG)
            times.append(time.monotonic() - began)
            assert (status, told["retry-after"]) == (429, "1")
            assert json.loads(raw)["error"]["type"] == "rate_limit_error"
        assert statistics.median(times) < 0.05
        times = []
        for _ in range(20):
            began = time.monotonic()
            it.health()
            times.append(time.monotonic() - began)
        assert statistics.median(times) < 0.05
        for connection in waiting:
            connection.close()
        it.wait(busy=0, queue=0)
        assert 'nanochat_ended{reason="aborted"} 66' in it.request("/metrics")[2].decode()


def test_who_leaves_frees_the_slots(model: GPT, tokenizer: Tokenizer) -> None:
    """Streaming or not, in the queue or under way, by a reset or in order."""
    with running(model, tokenizer, slots=2) as it, slowed(model, 0.01):
        for stream in (False, True):
            for resets in (False, True):
                connections = [it.begin({**LONG, "stream": stream, "n": 2}) for _ in range(2)]
                it.wait(busy=2, queue=2)
                if stream:
                    assert connections[0].recv(100).startswith(b"HTTP/1.1 200")
                for connection in connections:
                    if resets:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    connection.close()
                it.wait(seconds=1, busy=0, queue=0)
        metrics = it.request("/metrics")[2].decode()
    assert 'nanochat_ended{reason="aborted"} 16' in metrics
    for line in metrics.splitlines():
        assert re.fullmatch(
            r'# TYPE nanochat_\w+ (gauge|counter)|nanochat_\w+(\{reason="\w+"\})? \d+', line
        ), line


def test_a_device_that_fails_fails_the_request_and_not_the_server(model: GPT, tokenizer: Tokenizer) -> None:
    with running(model, tokenizer, slots=2) as it:
        broken = [True]

        def fail(*_: Any) -> None:
            if broken[0]:
                torch.empty(1 << 55)  # more memory than there is

        hook = model.blocks[-1].register_forward_pre_hook(fail)
        status, _, raw = it.request("/v1/completions", LONG)
        assert (status, json.loads(raw)["error"]["type"]) == (500, "server_error")
        status, _, raw = it.request("/v1/completions", {**LONG, "stream": True})
        assert status == 200
        assert json.loads(raw.decode().removeprefix("data: "))["error"]["type"] == "server_error"
        hook.remove()
        assert it.request("/v1/completions", LONG)[0] == 200


# ---------------------------------------------------------------------------------------------------------
# Hostile bodies

KEYS = st.sampled_from(["role", "content", "type", "text", "parts", "id"]) | st.text(max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "system", "assistant", "text", "python", "<|user_end|>", "tiny"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [
    "messages",
    "prompt",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
]
FIELDS += ["stream_options", "tools", "logprobs", "response_format", "user", "max_completion_tokens", "echo"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound body with some fields replaced, and perhaps some bytes."""
    body: dict[str, Any] = {**HI, "max_tokens": 2, "prompt": "a"}
    body.pop(draw(st.sampled_from(["messages", "prompt"])))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        body[name] = draw(VALUES)
    if draw(st.booleans()) and isinstance(body.get("messages"), list):
        body["messages"] = [*body["messages"], draw(VALUES), *body["messages"]][: draw(st.integers(0, 3))]
    raw = bytearray(json.dumps(body).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 4]))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


def attack(it: Running, examples: int) -> None:
    seen = set()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(raw=mutated(), path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
    def no_body_is_the_servers_fault(raw: bytes, path: str) -> None:
        status, _, answer = it.request(path, raw)
        seen.add(status)
        assert status in (200, 400, 404), (raw, answer)
        if status != 200:
            assert json.loads(answer)["error"]["message"]

    no_body_is_the_servers_fault()
    assert {200, 400} <= seen
    it.wait(busy=0, queue=0)


def test_mutated_bodies(here: Running) -> None:
    attack(here, 100)


class Remote(Running):
    """A server in a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port


@pytest.mark.slow
def test_mutated_bodies_and_memory(tmp_path: Path) -> None:
    """5,000 bodies at the command: its memory, threads and descriptors are those of before."""
    base = trained_base(tmp_path, num_iterations=1)
    command = [sys.executable, "-m", "scripts.chat_web", "--run", "tiny", "--port", "0"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Open "))
        it = Remote(int(re.search(r":(\d+) ", line)[1]))  # type: ignore[index]
        attack(it, 1_000)
        before = _held(process.pid)
        attack(it, 5_000)
        after = _held(process.pid)
        process.terminate()
    assert after[0] - before[0] < 30 << 20
    assert after[1] <= before[1] + 2  # workers of the event loop come and go
    assert after[2] <= before[2] + 3


def _held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads and descriptors of a process."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))


# ---------------------------------------------------------------------------------------------------------
# The command


def test_the_command_refuses_what_would_open_the_machine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--host=0.0.0.0: others can reach it, and there is no key"):
        chat_web.key_of(ChatWebArgs(host="0.0.0.0"))
    assert chat_web.key_of(ChatWebArgs(host="0.0.0.0", key=False)) == ""
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert chat_web.key_of(ChatWebArgs(host=host)) == ""
    path = tmp_path / "key"
    for wrong in ("", "\n", "two words", "caf\u00e9"):
        path.write_text(wrong, "utf-8")
        with pytest.raises(UserError, match="holds no key"):
            chat_web.key_of(ChatWebArgs(api_key_file=str(path)))
    path.write_text("abc\n")
    assert chat_web.key_of(ChatWebArgs(host="::", api_key_file=str(path))) == "abc"
    with listener.bind("127.0.0.1", 0) as one:
        one.listen()
        with pytest.raises(UserError, match="another program has it"):
            listener.bind("127.0.0.1", one.getsockname()[1])
        assert listener.address_of(one) == f"http://127.0.0.1:{one.getsockname()[1]}"
    with pytest.raises(UserError, match=r"--host=no\.such\.name\.invalid"):
        listener.bind("no.such.name.invalid", 0)


@pytest.mark.slow
def test_the_command_serves_drains_and_logs_nothing(tmp_path: Path) -> None:
    """A reply under way at SIGTERM ends as usual; what was said is in no output; the file has it."""
    base, log = (
        trained_base(tmp_path, num_iterations=1, max_seq_len=2048, total_batch_size=8192, keep_tails=True),
        tmp_path / "log",
    )
    command = [sys.executable, "-m", "scripts.chat_web", "--run", "tiny", "--port", "0"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    with subprocess.Popen(
        [*command, "--log-conversations", str(log)], cwd=REPO, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        output = ""
        while not (found := re.search(r"Open http://127.0.0.1:(\d+) ", output)):
            assert (line := process.stdout.readline()), output
            output += line
        port = int(found[1])
        taken = subprocess.run(
            [*command[:-1], str(port)], cwd=REPO, env=environment, capture_output=True, text=True
        )
        assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
        assert "another program has it" in taken.stderr
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for body in (b"{", json.dumps({"prompt": "xyzzy", "temperature": "xyzzy"})):
            connection.request("POST", "/v1/completions?xyzzy", body, JSON)
            answer = connection.getresponse()
            assert answer.status == 400
            answer.read()
        body = {"prompt": "xyzzy the cat", "max_tokens": 500, "stream": True, "seed": 1}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        read = answer.read(200)
        process.send_signal(signal.SIGTERM)
        read += answer.read()
        assert read.endswith(b"data: [DONE]\n\n")
        output += process.communicate(timeout=30)[0]
    assert "xyzzy" not in output
    assert "Traceback" not in output, output
    assert log.stat().st_mode & 0o777 == 0o600
    kept = json.loads(log.read_text("utf-8"))
    assert kept["request"] == body
    assert kept["answer"]["choices"][0]["finish_reason"] in ("stop", "length")
