"""Listening socket of a server: its address, who can reach it, and the key that lets them in."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

from nanochat.common.errors import UserError

UNREAD_MS = 30_000  # after which a client that takes nothing has left


def bind(host: str, port: int) -> socket.socket:
    """A socket that has a port, and does not answer yet.

    Raises:
        UserError: another program has the port, or it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
        made.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host={host}: {error.strerror}. Name an address of this machine.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"--port={port}: another program has it. Choose another with --port, or end that program."
            raise UserError(what) from None
        raise UserError(f"--host={host} --port={port}: {error.strerror}. Choose others.") from None
    return made


def address_of(bound: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = bound.getsockname()[:2]
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: str) -> str:
    """The key that a file holds.

    Raises:
        UserError: it holds none.
    """
    try:
        key = Path(path).read_text("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key.isprintable() or not key or " " in key:
        advice = f"Make one: openssl rand -hex 24 > {path}"
        raise UserError(f"--api-key-file={path}: holds no key, one word of ASCII. {advice}")
    return key
