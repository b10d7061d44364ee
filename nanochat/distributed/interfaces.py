"""Network interfaces: the one of this machine that leads to the other machines of a run.

gloo takes the interface that the machine's own name leads to. On many images that is 127.0.1.1, where no
other machine is met; with several networks it may be one that the others are not on. The way to where the
ranks have met already is known to work: the interface on that route is taken.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from nanochat.common.errors import UserError

GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def announce(store: Any, rank: int, host: str, port: int) -> str:
    """Leave this rank's address on the way to where the ranks have met; returns it, "" if there is none.

    Args:
        store: the torch.distributed.Store where the ranks of this start have met.
        rank: number of this rank.
        host: name or address of the machine where they have met.
        port: the port there.
    """
    try:
        own = address_toward(host, port)
    except OSError:
        own = ""
    store.set(f"address/{rank}", own)
    return own


def find(store: Any, own: str, rank: int, size: int, port: int) -> tuple[str, str]:
    """The interface that leads to the other machines, and its address. All ranks have announced theirs.

    On the machine where the ranks have met, the way there may end in the loopback, by which nobody else
    comes. There the way to a rank on another machine is asked for instead.

    Args:
        store: where they have announced them.
        own: what `announce` returned.
        rank: number of this rank.
        size: number of ranks.
        port: any, to ask for a way with.

    Returns:
        Two empty strings where all ranks turn out to be on one machine.

    Raises:
        UserError: the system does not tell.
    """
    if own and is_loopback(own):
        others = (store.get(f"address/{other}").decode() for other in range(size) if other != rank)
        away = next((address for address in others if address and not is_loopback(address)), None)
        if away is None:
            return "", ""
        own = address_toward(away, port)
    if not own or not (name := interface_of(own)):
        present = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"rank {rank}: the network interface that leads to the other machines cannot be told "
            f"(address: {own or 'none'}). Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its name on every "
            f"machine. This one has: {present}."
        )
    return name, own


def address_toward(host: str, port: int) -> str:
    """The address of this machine on the route to another. No packet is sent.

    Raises:
        OSError: the name is not known, or there is no route.
    """
    error = OSError(f"{host} has no address")
    for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as route:
            try:
                route.connect(place)
            except OSError as unreachable:  # a name may have an address of IPv6 where only IPv4 leads out
                error = unreachable
                continue
            return str(route.getsockname()[0])
    raise error


def is_loopback(address: str) -> bool:
    """Whether an address leads from a machine to itself alone."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str:
    """The name of the interface that has an address, or "" where the system does not tell."""
    if sys.platform != "linux":
        return ""
    if ":" in address:
        wanted = ipaddress.ip_address(address.partition("%")[0]).packed.hex()
        table = Path("/proc/net/if_inet6").read_text("utf-8").splitlines()
        return next((line.split()[5] for line in table if line.startswith(wanted)), "")
    import fcntl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
