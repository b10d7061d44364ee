"""HTTP: the page and OpenAI's endpoints, for the clients on this machine.

The event loop only passes on: each model computes in the thread of its batcher, which puts what it adds into
an inbox of the request. Who leaves frees their slots with the next iteration, streaming or not.

A browser runs the code of strangers beside the page, so a request has to name this machine as its Host (a
name can be made to point here), to come from the page if from any, and to be JSON. Nothing that is said is
kept or logged unless asked for.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import json
import logging
import os
import re
import secrets
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.chat import replies
from nanochat.chat.tools import ToolCalls
from nanochat.config.arguments import ChatWebArgs
from nanochat.model.gpt import GPT
from nanochat.serve import batcher, openai_api
from nanochat.serve.batcher import Batcher, Full, Handle
from nanochat.serve.openai_api import ApiError, Event, Reply, Served

SILENCE_S = 15.0  # after which a comment keeps a stream alive
BODY_S = 30.0  # in which a body has to arrive
STREAM = {"content-type": "text/event-stream", "x-accel-buffering": "no"}
COUNTERS = ("busy", "queue", "prompt_computed", "prompt_reused", "generated")  # of batcher.Stats
ADDRESS = re.compile(r"\[[\da-f:.]+\]|[\d.]+")  # a host that no name server can make to point elsewhere


class _Device:
    """A model on its device: its batcher, the batcher's thread, and what a reply may draw."""

    def __init__(self, model: GPT, served: Served, args: ChatWebArgs) -> None:
        tokenizer, self.masks = served.tokenizer, replies.masks(model)
        self.rules = partial(ToolCalls, tokenizer, True)
        self.batcher = Batcher(model, tokenizer, args.slots, max_queue=args.max_queue, masks=self.masks)
        self.thread = threading.Thread(target=self.batcher.run, name="batcher", daemon=True)


class Server:
    """The application.

    Attributes:
        app: for uvicorn.
    """

    def __init__(self, served: Served, models: Sequence[GPT], args: ChatWebArgs, key: str) -> None:
        """Prepare to serve one model.

        Args:
            served: what is told of it.
            models: the same on each device.
            args: limits, and who may ask.
            key: that a request has to bring; "" for none.
        """
        self._served, self._args = served, args
        self._devices = [_Device(model, served, args) for model in models]
        page = importlib.resources.files("nanochat.serve").joinpath("page.html").read_text("utf-8")
        methods: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        cors = [Middleware(CORSMiddleware, allow_origins=args.allow_origin, **methods)]
        self.app = Starlette(
            routes=[
                Route("/", partial(_page, page)),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", partial(self._complete, True), methods=["POST"]),
                Route("/v1/completions", partial(self._complete, False), methods=["POST"]),
            ],
            middleware=[*(cors if args.allow_origin else ()), Middleware(_Guard, args=args, key=key)],
            exception_handlers={ApiError: _refused, HTTPException: _refused, Exception: _refused},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        for device in self._devices:
            device.thread.start()
        yield
        for device in self._devices:
            device.batcher.close()
            device.thread.join()

    async def _models(self, _: Request) -> Response:
        return JSONResponse(self._served.listed())

    def _counted(self) -> dict[str, int]:
        """Slots and counters of all devices together."""
        stats = [device.batcher.stats for device in self._devices]
        totals = {name: sum(getattr(one, name) for one in stats) for name in COUNTERS}
        return {"slots": self._args.slots * len(stats), **totals}

    async def _health(self, _: Request) -> Response:
        is_well = all(device.thread.is_alive() for device in self._devices)
        state = {"status": "ok" if is_well else "failed", "model": self._served.name, **self._counted()}
        return JSONResponse(state, 200 if is_well else 503)

    async def _metrics(self, _: Request) -> Response:
        """The counters as Prometheus reads them."""
        ended = sum((Counter(device.batcher.stats.ended) for device in self._devices), Counter())
        values = self._counted() | {f'ended{{reason="{name}"}}': count for name, count in ended.items()}
        text = "".join(f"nanochat_{name} {value}\n" for name, value in values.items())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _complete(self, is_chat: bool, request: Request) -> ASGIApp:
        """Read a request in a thread, since a long text takes a while; then answer it."""
        try:
            raw = await asyncio.wait_for(self._body(request), BODY_S)
        except (asyncio.TimeoutError, ClientDisconnect):
            raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s. Send it again.") from None
        asked = await asyncio.to_thread(openai_api.read, raw, self._served, is_chat)
        stats = {device: device.batcher.stats for device in self._devices}
        device = min(stats, key=lambda device: stats[device].busy + stats[device].queue)
        return _Answer(device, raw, Reply(asked, self._served), self._args)

    async def _body(self, request: Request) -> bytes:
        raw, most = bytearray(), self._args.max_body
        async for piece in request.stream():
            raw += piece
            if len(raw) > most:
                raise ApiError(413, f"the body has more than {most:,} bytes. Shorten the request.")
        return bytes(raw)


class _Inbox:
    """Events on their way from the batcher's thread to the event loop, by the index of their choice."""

    def __init__(self) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[tuple[int, Event]] = deque()
        self._is_called = False

    def put(self, index: int, event: Event) -> None:
        """Add an event, in the batcher's thread; several wake the loop once."""
        if isinstance(event, Exception):  # the client learns that it failed; why, is for who runs the server
            logging.getLogger("uvicorn.error").error("the model failed at a request", exc_info=event)
        self._events.append((index, event))
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, patience: float) -> list[tuple[int, Event]]:
        """All that came, once something did; nothing where nothing comes for `patience` seconds."""
        timer = self._loop.call_later(patience, self._arrived.set)
        await self._arrived.wait()
        timer.cancel()
        self._arrived.clear()
        self._is_called = False  # before they are taken: what comes now wakes the loop again
        return [self._events.popleft() for _ in range(len(self._events))]


class _Answer:
    """The answer to a request, as an ASGI application: it races the client's leaving."""

    def __init__(self, device: _Device, raw: bytes, reply: Reply, args: ChatWebArgs) -> None:
        self._device, self._raw, self._reply, self._args = device, raw, reply, args
        self._inbox = _Inbox()
        self._handles: dict[int, Handle] = {}  # of the choices that have not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit, and pass on what comes until the last choice has ended or the client has left.

        Raises:
            ApiError: too many requests wait, or the model failed before anything was sent.
        """
        sending = self._stream(send) if self._reply.asked.stream else self._send_whole(scope, receive, send)
        tasks = [asyncio.create_task(sending), asyncio.create_task(_left(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self._abort(*self._handles)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._args.log_conversations:
            await asyncio.to_thread(self._keep)

    def _submit(self) -> None:
        """Ask the batcher for every choice.

        Raises:
            ApiError: too many wait.
        """
        asked, device = self._reply.asked, self._device
        rules, masks = (device.rules, device.masks) if asked.is_chat else (None, None)
        wanted = [(name, sample) for name in range(len(asked.prompts)) for sample in range(asked.n)]
        for index, (name, sample) in enumerate(wanted):
            request = batcher.Request(asked.prompts[name], asked.sampling, name, sample, rules, masks)
            try:
                self._handles[index] = device.batcher.submit(request, partial(self._inbox.put, index))
            except Full as error:
                raise ApiError(429, f"the server is busy: {error}. Try again soon.") from None

    def _abort(self, *indices: int) -> None:
        for index in indices:
            self._device.batcher.abort(self._handles.pop(index))

    async def _chunks(self) -> AsyncIterator[list[dict[str, Any]] | None]:
        """Chunks as they come, and None after each 15 s of silence."""
        loop, reply = asyncio.get_running_loop(), self._reply
        ends = loop.time() + self._args.max_seconds
        while not reply.is_done:
            events = await self._inbox.take(min(SILENCE_S, max(ends - loop.time(), 0)))
            yield reply.take(events) if events else None
            # At a stop string, or when its time is over: the batcher then says that it was cut off.
            is_late = loop.time() >= ends
            self._abort(*[index for index in self._handles if is_late or reply.choices[index].finish])
            ends = float("inf") if is_late else ends

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._submit()
        async for _ in self._chunks():
            pass
        await JSONResponse(self._reply.whole())(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async def write(text: str, *chunks: Any, more: bool = True) -> None:
            # In ASCII: some readers take U+2028 in a line for its end.
            text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + text
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        self._submit()
        headers = [(name.encode(), value.encode()) for name, value in STREAM.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await write("", *self._reply.opening())
        try:
            async for chunks in self._chunks():
                await write("" if chunks is not None else ": \n\n", *(chunks or ()))
            await write("data: [DONE]\n\n", *self._reply.closing(), more=False)
        except ApiError as error:  # the status is sent: the client reads it in the stream
            await write("", error.body(), more=False)

    def _keep(self) -> None:
        """Append a request and its answer to the file that the user named, which nobody else may read."""
        line = json.dumps({"request": json.loads(self._raw), "answer": self._reply.whole()}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(os.open(self._args.log_conversations, flags, 0o600), "w") as file:
            file.write(line)


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Who may ask, and what every answer tells a browser."""

    def __init__(self, app: ASGIApp, args: ChatWebArgs, key: str) -> None:
        self._app, self._key, self._origins = app, key, args.allow_origin
        self._names = {"localhost", args.host.lower(), *(name.lower() for name in args.allow_host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"})
            await send(message)

        app, sending = self._app, send
        if scope["type"] == "http":
            sending = send_with_policy
            try:
                self._check(scope, Headers(scope=scope))
            except ApiError as error:
                app = _refused(None, error)
        await app(scope, receive, sending)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse another Host, another site, another type than JSON, and who has not the key.

        Raises:
            ApiError: one of these.
        """
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        name = re.sub(r":\d*$", "", host)
        if name not in self._names and not ADDRESS.fullmatch(name):
            advice = "Ask for localhost, or start the server with --allow-host"
            raise ApiError(403, f"the host {name[:80]!r} is not this server's name. {advice}.")
        if origin and origin not in self._origins and origin.lower().partition("://")[2] != host:
            advice = "Start the server with --allow-origin to let it"
            raise ApiError(403, f"the site {origin[:80]!r} may not use this server. {advice}.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, "the Content-Type is not application/json. Send JSON, and say so.")
        given = headers.get("authorization", "").partition(" ")[2].strip()
        is_open = not self._key or scope["path"] in ("/", "/health")
        if not is_open and not secrets.compare_digest(given.encode(), self._key.encode()):
            message = "this server wants its key: send the header Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")


def _refused(_: Request | None, error: Exception) -> Response:
    """The answer to a request that cannot be answered, in OpenAI's form."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # of the routes: no such path, or another method
        headers |= error.headers or {}
        error = ApiError(error.status_code, f"{error.detail}.")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed at this request.")
    headers |= {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    return JSONResponse(error.body(), error.status, headers)


async def _page(page: str, _: Request) -> Response:
    """The page, which may run its own script and fetch from this server, and nothing else."""
    policy = "default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    policy += "; frame-ancestors 'none'"
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})
