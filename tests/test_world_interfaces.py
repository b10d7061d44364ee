"""Network interfaces of a run on several machines: network namespaces with a link between them, on this one.

The name of each machine leads to 127.0.1.1 there, as on many images; each knows the address of the other.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.distributed import interfaces
from tests.conftest import REPO
from tests.tiny import command_line, tiny_corpus

MAY = ["unshare", "--map-root-user", "--net", "--mount", "--uts"]
# Two machines: $1 is a folder for what they say to each other, $2 and $3 what they run, its output beside it.
MACHINES = """
set -e
cd "$1"
mkfifo born linked
printf '127.0.0.1 localhost\\n127.0.1.1 first\\n10.77.3.2 second\\n' >hosts.first
printf '127.0.0.1 localhost\\n127.0.1.1 second\\n10.77.3.1 first\\n' >hosts.second
export second="$3"
unshare --net --mount --uts sh -ec '
  echo >born
  hostname second
  mount --bind hosts.second /etc/hosts
  read -r _ <linked
  ip link set lo up
  ip addr add 10.77.3.2/24 dev vb
  ip link set vb up
  eval "$second" >said.second 2>&1' &
other=$!
read -r _ <born
hostname first
mount --bind hosts.first /etc/hosts
ip link set lo up
ip link add va type veth peer name vb netns $other
ip addr add 10.77.3.1/24 dev va
ip link set va up
echo >linked
eval "$2" >said.first 2>&1 || echo "exit code $?" >>said.first
wait $other || echo "exit code $?" >>said.second
"""


def on_two_machines(folder: Path, first: str, second: str, timeout_s: float = 60) -> tuple[str, str]:
    """Run a line of shell on each; returns what each said."""
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces are made with unshare and ip of Linux")
    if subprocess.run([*MAY, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here")
    folder.mkdir()
    lines = [f"cd {shlex.quote(str(REPO))}; {line}" for line in (first, second)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    command = [*MAY, "timeout", str(timeout_s), "sh", "-c", MACHINES, "sh", str(folder), *lines]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s + 10)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in folder.glob("said.*"))
    return (folder / "said.first").read_text(), (folder / "said.second").read_text()


def test_the_interface_is_the_one_on_the_route(tmp_path: Path) -> None:
    asked = "import sys; from nanochat.distributed import interfaces as i; host = sys.argv[1]; "
    asked += "own = i.address_toward(host, 1); print(own, i.is_loopback(own), i.interface_of(own))"
    ask = f"{shlex.quote(sys.executable)} -c {shlex.quote(asked)}"
    first, second = on_two_machines(tmp_path / "net", f"{ask} second; {ask} first", f"{ask} first; {ask} ::1")
    assert first.splitlines() == ["10.77.3.1 False va", "127.0.0.1 True lo"]
    assert second.splitlines() == ["10.77.3.2 False vb", "::1 True lo"]


def test_ranks_of_one_machine_need_no_interface() -> None:
    store = dist.HashStore()
    own = [interfaces.announce(store, rank, "127.0.0.1", 29500) for rank in range(2)]
    assert own == ["127.0.0.1"] * 2
    assert interfaces.find(store, own[0], 0, 2, 29500) == ("", "")


def test_an_interface_that_cannot_be_told_is_asked_for() -> None:
    store = dist.HashStore()
    assert interfaces.announce(store, 0, "fe80::1%no-such", 29500) == ""
    for address in ("", "192.0.2.77"):  # of a network for examples: nobody has it
        with pytest.raises(UserError, match="Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME .* has: .*lo"):
            interfaces.find(store, address, 0, 2, 29500)


@pytest.mark.slow
def test_two_machines_meet_whose_names_lead_to_themselves(tmp_path: Path) -> None:
    tiny_corpus(tmp_path)
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --nnodes=2 --nproc_per_node=1"
    meet = "--rdzv-backend=c10d --rdzv-endpoint=first:29477 --rdzv-id=two -m scripts.base_train --"
    train = f"{torchrun} {meet} {shlex.join(command_line(run='two', num_iterations=3, dist_timeout=30))}"
    first, second = on_two_machines(tmp_path / "net", train, train, timeout_s=200)
    summary = files.read_json(files.run_dir("two") / "summary.json")
    assert (summary["status"], summary["steps"], summary["world_size"]) == ("finished", 3, 2), first + second
    assert "first: va (10.77.3.1) leads to the other machines; GLOO_SOCKET_IFNAME and" in first
    assert "second: vb (10.77.3.2) leads to the other machines" in second
