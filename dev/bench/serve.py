"""The server under load, as its users meet it: `scripts.chat_web` at its default flags, on loopback.

    python -m dev.bench.serve --run RUN [--soak MINUTES] [--json FILE]

Streams ask in a closed loop: who has an answer asks again. Measured are tokens a second of one stream and of
eight, the time to the first token and between tokens, what a conversation's tenth turn reads again, 100
clients that leave (in the queue, while their prompt is read, in the reply; streamed or not), and what the
request is told that finds the queue full. With --soak, instead: full load for so long, while clients are
killed at random, and what the server holds at the end. Each line has its figure and its bar; the exit code is
1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from nanochat.common import files

STREAMS, REQUESTS, TOKENS = 8, 6, 96
SLOTS, QUEUE = 16, 64  # of the server by default
LEAVERS = 100
LONG_PROMPT = "one two three four five six seven eight nine ten " * 12  # some 200 tokens


class Client:
    """What talks to the server, and what it has seen.

    Attributes:
        first: seconds to the first token of each reply.
        between: seconds between chunks.
        tokens: that came.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None))
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0

    async def stream(self, body: dict[str, Any], path: str = "completions") -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer, timed."""
        began = last = time.perf_counter()
        asked = {"stream": True, "stream_options": {"include_usage": True}, **body}
        async with self.http.stream("POST", f"{self.url}/v1/{path}", json=asked) as answer:
            answer.raise_for_status()
            has_begun = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk, now = json.loads(line[6:]), time.perf_counter()
                if chunk.get("usage"):
                    self.tokens += chunk["usage"]["completion_tokens"]
                elif has_begun:
                    self.between.append(now - last)
                elif has_text(chunk):
                    self.first.append(now - began)
                    has_begun = True
                last = now
                yield chunk

    async def ask(self, seed: int) -> None:
        """One text, to its end."""
        async for _ in self.stream({"prompt": "The", "max_tokens": TOKENS, "seed": seed}):
            pass

    async def numbers(self) -> dict[str, float]:
        """The counters of /metrics."""
        text = (await self.http.get(f"{self.url}/metrics")).text
        return {name: float(value) for name, value in map(str.split, text.splitlines())}

    async def idle(self) -> None:
        """Wait until the server has nothing to do."""
        while True:
            health = (await self.http.get(f"{self.url}/health")).json()
            if not health["busy"] and not health["queue"]:
                return
            await asyncio.sleep(0.01)


def has_text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk has something of the reply."""
    choice = chunk["choices"][0] if chunk["choices"] else {}
    return bool(
        choice.get("text") or choice.get("delta", {}).get("content") or "part" in choice.get("delta", {})
    )


def percentile(values: list[float], percent: int) -> float:
    """The value that so many per cent do not pass."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


async def throughput(client: Client) -> dict[str, float]:
    """One stream and eight; then eight beside long prompts that arrive."""
    figures: dict[str, float] = {}
    for streams in (1, STREAMS):
        client.clear()
        began = time.perf_counter()
        await asyncio.gather(*(repeat(client, stream) for stream in range(streams)))
        figures[f"tokens/s, {streams}"] = client.tokens / (time.perf_counter() - began)
        figures[f"first token, {streams}, p95 ms"] = 1e3 * percentile(client.first, 95)
        figures[f"between tokens, {streams}, p99 ms"] = 1e3 * percentile(client.between, 99)
    client.clear()
    talking = asyncio.gather(*(repeat(client, stream) for stream in range(STREAMS - 1)))
    seen, reader = client.between, Client(0)
    reader.url, number, size = client.url, 0, 0
    while not talking.done():
        number += 1
        body = {"prompt": f"{number} {LONG_PROMPT}", "max_tokens": 1}
        async for chunk in reader.stream(body):
            size = (chunk.get("usage") or {}).get("prompt_tokens", size)
        await asyncio.sleep(0.2)
    await talking
    figures["tokens of a long prompt"] = size
    figures["between tokens beside long prompts, p99 ms"] = 1e3 * percentile(seen, 99)
    return figures


async def repeat(client: Client, stream: int) -> None:
    """A stream: one request after the other."""
    for number in range(REQUESTS):
        await client.ask(100 * stream + number)


async def turns(client: Client) -> dict[str, float]:
    """Ten turns of a conversation: what the tenth reads, and how long it waits."""
    messages: list[dict[str, Any]] = []
    await client.idle()
    client.clear()
    read = 0.0
    for number in range(10):
        before = (await client.numbers())["nanochat_prompt_computed"]
        messages.append({"role": "user", "content": f"hi {number}"})
        body = {"messages": messages, "max_tokens": 4, "temperature": 0}
        parts: list[dict[str, str]] = []
        async for chunk in client.stream(body, "chat/completions"):
            delta = chunk["choices"][0].get("delta", {}) if chunk["choices"] else {}
            parts += [{"type": "text", "text": delta["content"]}] if delta.get("content") else []
            parts += [delta["part"]] if "part" in delta else []
        messages.append({"role": "assistant", "content": parts or ""})
        read = (await client.numbers())["nanochat_prompt_computed"] - before
    return {
        "tokens read at turn 10": read,
        "first token at turn 10, share of turn 1": client.first[-1] / client.first[0],
    }


async def leavers(client: Client) -> dict[str, float]:
    """Clients that close the connection, each at a random moment, streamed or not."""
    await client.idle()
    before = (await client.numbers()).get('nanochat_ended{reason="aborted"}', 0)
    rng, port = random.Random(0), int(client.url.rpartition(":")[2])
    slowest, left = 0.0, 0
    for number in range(LEAVERS):
        crowd = number % 4 == 0  # then it waits in the queue
        writers = [await begin(port, {"stream": n % 2 == 0}) for n in range(SLOTS + 4 if crowd else 1)]
        left += len(writers)
        await asyncio.sleep(rng.choice((0, 0.002, 0.01, 0.03)))
        for writer in writers:
            writer.transport.abort()
        began = time.perf_counter()
        await client.idle()
        slowest = max(slowest, time.perf_counter() - began)
    numbers = await client.numbers()
    ended = sum(value for name, value in numbers.items() if "ended" in name)
    return {
        "clients that left": left,
        "left and not aborted": left - (numbers['nanochat_ended{reason="aborted"}'] - before),
        "slots busy after them": numbers["nanochat_busy"],
        "slowest to be idle again, ms": 1e3 * slowest,
        "ended in all": ended,
    }


async def begin(port: int, more: dict[str, Any]) -> asyncio.StreamWriter:
    """A request that asks for a long reply on a connection of its own."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": LONG_PROMPT[:150], "max_tokens": 10**6, "temperature": 1, **more}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return writer


async def overload(client: Client) -> dict[str, float]:
    """The request after the last that may wait, and /health meanwhile."""
    await client.idle()
    port = int(client.url.rpartition(":")[2])
    refused: list[float] = []
    health: list[float] = []
    keeping = True

    async def keep_full() -> None:
        while keeping:
            try:
                async for _ in client.stream({"prompt": "The", "max_tokens": 200}):
                    pass
            except httpx.HTTPStatusError:
                await asyncio.sleep(0.01)

    crowd = [asyncio.create_task(keep_full()) for _ in range(SLOTS + QUEUE + 8)]
    await asyncio.sleep(1)
    for _ in range(100):
        began = time.perf_counter()
        answer = await client.http.post(
            f"{client.url}/v1/completions", json={"prompt": "The", "max_tokens": 1}
        )
        if answer.status_code == 429:
            refused.append(time.perf_counter() - began)
        began = time.perf_counter()
        await client.http.get(f"http://127.0.0.1:{port}/health")
        health.append(time.perf_counter() - began)
    keeping = False
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    await client.idle()
    return {
        "refused with 429": len(refused),
        "refusal, p99 ms": 1e3 * percentile(refused or [9.0], 99),
        "/health at full load, p99 ms": 1e3 * percentile(health, 99),
    }


def held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads and descriptors of a process."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))


KILLED = """
import json, sys, http.client
while True:
    one = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    body = json.dumps({"prompt": "The", "max_tokens": 300, "stream": True})
    one.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    one.getresponse().read()
"""


async def soak(client: Client, pid: int, minutes: float) -> dict[str, float]:
    """Full load, with clients killed at random: what is held after a minute and at the end."""
    port, rng, killed = client.url.rpartition(":")[2], random.Random(0), 0
    clients: list[subprocess.Popen[bytes]] = []
    ends, first = time.monotonic() + 60 * minutes, held(pid)
    has_begun = False
    while time.monotonic() < ends:
        while len(clients) < SLOTS + 4:
            clients.append(subprocess.Popen([sys.executable, "-c", KILLED, port], stderr=subprocess.DEVNULL))
        await asyncio.sleep(rng.random())
        victim = clients.pop(rng.randrange(len(clients)))
        victim.kill()
        victim.wait()
        killed += 1
        if not has_begun and time.monotonic() > ends - 60 * (minutes - 1):
            first, has_begun = held(pid), True
    for victim in clients:
        victim.kill()
        victim.wait()
    await client.idle()
    last = held(pid)
    return {
        "clients killed": killed,
        "resident, MB more": (last[0] - first[0]) / 1e6,
        "threads more": last[1] - first[1],
        "descriptors more": last[2] - first[2],
        "slots busy at the end": (await client.numbers())["nanochat_busy"],
    }


def bars(found: dict[str, float]) -> dict[str, tuple[float, bool]]:
    """Each bar with whether it is met."""
    eight = f"tokens/s, {STREAMS}"
    ratios = {
        "eight streams, times one": (found.get(eight, 0) / found.get("tokens/s, 1", 1), 3.0, True),
        "first token at eight, times one": (
            found.get(f"first token, {STREAMS}, p95 ms", 0) / found.get("first token, 1, p95 ms", 1),
            4.0,
            False,
        ),
        "between tokens beside long prompts, times without": (
            found.get("between tokens beside long prompts, p99 ms", 0)
            / found.get(f"between tokens, {STREAMS}, p99 ms", 1),
            3.0,
            False,
        ),
    }
    limits = {
        "tokens read at turn 10": 16.0,  # the message, the marks around it, and 8
        "first token at turn 10, share of turn 1": 1.5,
        "left and not aborted": 0.0,
        "slots busy after them": 0.0,
        "refusal, p99 ms": 50.0,
        "/health at full load, p99 ms": 50.0,
        "resident, MB more": 50.0,
        "threads more": 2.0,
        "descriptors more": 4.0,
        "slots busy at the end": 0.0,
    }
    if eight in found:
        found |= {name: value for name, (value, _, _) in ratios.items()}
    judged = {name: (limit, found[name] <= limit) for name, limit in limits.items() if name in found}
    for name, (value, bar, is_least) in ratios.items():
        if name in found:
            judged[name] = bar, value >= bar if is_least else value <= bar
    return judged


async def measured(port: int, pid: int, minutes: float) -> dict[str, float]:
    """Every figure."""
    client = Client(port)
    await client.ask(0)
    if minutes:
        return await soak(client, pid, minutes)
    found: dict[str, float] = {}
    parts: tuple[Callable[[Client], Awaitable[dict[str, float]]], ...] = (
        throughput,
        turns,
        leavers,
        overload,
    )
    for part in parts:
        found |= await part(client)
    return found


def main() -> None:
    """Start the server, measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    command = [sys.executable, "-m", "scripts.chat_web", "--run", args.run, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("Open "))
        port = int(re.findall(r":(\d+) ", line)[0])
        try:
            found = asyncio.run(measured(port, server.pid, args.soak))
        finally:
            server.terminate()
    judged = bars(found)
    for name, value in found.items():
        bar = (
            f"   bar {judged[name][0]:g}: {'met' if judged[name][1] else 'MISSED'}" if name in judged else ""
        )
        print(f"{name:52} {value:10,.2f}{bar}")
    if args.json:
        about = {"commit": commit.strip(), "cores": os.cpu_count(), "run": args.run}
        files.write_json(
            args.json, {**about, **found, "missed": [n for n, (_, met) in judged.items() if not met]}
        )
    sys.exit(not all(met for _, met in judged.values()))


if __name__ == "__main__":
    main()
