"""On CUDA: the possible backends are measured, the times are kept, and the next choice reads them."""

import pytest
import torch

from nanochat.common import files
from nanochat.distributed.world import World
from nanochat.model.attention_autotune import AttentionShape
from nanochat.model.attention_backends import available_backends, choose_backend, choose_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("documents", [False, True])
def test_the_possible_backends_are_measured_and_cached(documents):
    device, world = torch.device("cuda"), World.single_process("cuda")
    shape = AttentionShape(
        heads=6, kv_heads=6, head_dim=128, sequence_len=2048, window=512, documents=documents
    )
    possible = {name for name, reason in available_backends(device).items() if not reason}
    if len(possible) < 2:
        pytest.skip("one backend only: there is nothing to choose")
    torch._dynamo.reset()
    name, reason = choose_backend(device, "auto", torch.bfloat16, shape, world)
    assert "now cached" in reason, reason
    (times,) = files.read_json(files.attention_times_file()).values()
    assert set(times) == possible
    assert name == min(times, key=times.get)
    written = files.attention_times_file().read_bytes()
    precision, line = choose_precision(device, "bfloat16", "auto", False, shape, world)
    assert precision.attention == name
    assert "measured on this GPU; cached" in line
    assert files.attention_times_file().read_bytes() == written
