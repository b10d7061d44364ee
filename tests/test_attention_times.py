"""The choice among backends by measurement: real clocks, real candidates, real files, real ranks."""

import dataclasses
import json
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import files
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.distributed.world import World
from nanochat.model.attention import attention_reference
from nanochat.model.attention_autotune import AttentionShape, fastest, key_of, one_pass
from nanochat.model.attention_backends import choose_precision
from tests.dist.world import run_ranks

CPU = torch.device("cpu")
SHAPE = AttentionShape(heads=1, kv_heads=1, head_dim=4, sequence_len=256, window=32)
TWO = ("flex", "sdpa")


def reference_pass():
    """The definition, over all pairs of positions."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(64, 256, 1, 4, generator=g).requires_grad_() for _ in range(3))
    return lambda: torch.autograd.grad(attention_reference(q, k, v, window=32).sum(), (q, k, v))


def cpu_milliseconds(name):
    """A clock that runs anywhere; "reference" is a candidate like the others."""
    run = reference_pass() if name == "reference" else one_pass(name, SHAPE, torch.float32, CPU)
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def never(name):
    pytest.fail(f"{name} was measured")  # no Exception, so that it is not a candidate's failure


def cached():
    return json.loads(files.attention_times_file().read_text())


def test_candidates_are_measured_once_and_the_measurement_is_kept():
    name, reason = fastest(("reference", "sdpa"), cpu_milliseconds, "here", World.single_process())
    times = cached()["here"]
    assert name == min(times, key=times.get)
    assert set(times) == {"reference", "sdpa"}
    assert all(f"{who} {ms:.2f} ms" in reason for who, ms in times.items())
    assert "now cached" in reason
    again, reason = fastest(("reference", "sdpa"), never, "here", World.single_process())
    assert again == name
    assert reason.endswith("measured on this GPU; cached")


def test_a_candidate_that_raises_is_left_out_with_what_it_says_and_tried_again():
    """On a CPU, flex has no backward pass and the package of fa2 is absent."""
    for _ in range(2):
        name, reason = fastest(("fa2", "flex", "sdpa"), cpu_milliseconds, "here", World.single_process())
        assert name == "sdpa"
        assert "fa2 left out: ModuleNotFoundError: No module named 'flash_attn'" in reason
        assert "flex left out: NotImplementedError: FlexAttention does not support backward on CPU" in reason
        assert "not cached" in reason
        assert "\n" not in reason
    assert not files.attention_times_file().exists()


def test_where_none_can_be_measured_the_first_is_taken():
    name, reason = fastest(("fa2", "flex"), cpu_milliseconds, "here", World.single_process())
    assert name == "fa2"
    assert reason.startswith("none could be measured; fa2 left out: ")


@given(st.lists(st.floats(0.01, 1000), min_size=2, max_size=4), st.randoms())
def test_the_least_time_is_chosen(times, random):
    names = list(("fa3", "fa2", "flex", "sdpa")[: len(times)])
    random.shuffle(names)
    took = dict(zip(names, times, strict=True))
    key = f"{took}"
    for clock in (took.__getitem__, never):
        name, _ = fastest(names, clock, key, World.single_process())
        assert took[name] == min(times)


def test_another_measurement_leaves_those_before_it():
    times = {"flex": 1.0, "sdpa": 2.0}
    fastest(TWO, times.__getitem__, "one", World.single_process())
    fastest(TWO, {"flex": 4.0, "sdpa": 3.0}.__getitem__, "two", World.single_process())
    assert cached() == {"one": times, "two": {"flex": 4.0, "sdpa": 3.0}}
    assert fastest(TWO, never, "one", World.single_process())[0] == "flex"
    assert fastest(TWO, never, "two", World.single_process())[0] == "sdpa"


def test_a_candidate_that_has_no_time_yet_means_a_new_measurement():
    fastest(TWO, {"flex": 1.0, "sdpa": 2.0}.__getitem__, "here", World.single_process())
    more = {"fa2": 0.5, "flex": 1.0, "sdpa": 2.0}
    assert fastest(tuple(more), more.__getitem__, "here", World.single_process())[0] == "fa2"
    assert cached() == {"here": more}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"here": {"flex": 1.0, "sd',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"here": 3}',
        b'{"here": {"flex": "1.0", "sdpa": 2.0}}',
        b'{"here": {"flex": true, "sdpa": 2.0}}',
        b'{"here": {"flex": 0, "sdpa": 2.0}}',
        b'{"here": {"flex": NaN, "sdpa": 2.0}}',
        b'{"here": {"flex": 1' + b"0" * 400 + b', "sdpa": 2.0}}',
        b'{"other": [1], "here": {"flex": 1.0, "sdpa": 2.0}}',
    ],
)
def test_a_damaged_file_is_passed_over_and_made_anew(content):
    path = files.attention_times_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    times = {"flex": 4.0, "sdpa": 3.0}
    name, reason = fastest(TWO, times.__getitem__, "here", World.single_process())
    assert name == "sdpa"
    assert f"{path} is damaged" in reason
    assert "\n" not in reason
    assert cached() == {"here": times}


def test_where_nothing_can_be_written_the_choice_stands_and_a_notice_says_so(base_dir):
    base_dir.write_text("a file where the folder should be")
    name, reason = fastest(TWO, {"flex": 4.0, "sdpa": 3.0}.__getitem__, "here", World.single_process())
    assert name == "sdpa"
    assert f"{files.attention_times_file()} could not be written (" in reason
    assert "not cached" in reason


def test_a_folder_in_the_place_of_the_file_is_no_error():
    files.attention_times_file().mkdir(parents=True)
    name, reason = fastest(TWO, {"flex": 4.0, "sdpa": 3.0}.__getitem__, "here", World.single_process())
    assert name == "sdpa"
    assert "is damaged" in reason
    assert "could not be written" in reason


def choose_on_a_rank(world, folder):
    clock = {"fa2": 3.0, "flex": 1.0, "sdpa": 2.0}.__getitem__ if world.is_main else never
    for attempt in ("first", "second"):
        name, _ = fastest(("fa2", "flex", "sdpa"), clock, "here", world)
        (folder / f"{attempt}{world.rank}").write_text(name)


def test_the_main_rank_measures_and_all_take_its_choice(tmp_path):
    run_ranks(3, tmp_path, choose_on_a_rank, tmp_path)
    written = [
        (tmp_path / f"{attempt}{rank}").read_text() for attempt in ("first", "second") for rank in range(3)
    ]
    assert written == ["flex"] * 6


def test_each_part_of_what_is_measured_makes_another_key():
    key = key_of(SHAPE, torch.bfloat16, CPU)
    assert torch.__version__ in key
    others = [dataclasses.replace(SHAPE, **{part.name: 2}) for part in dataclasses.fields(SHAPE)]
    keys = {key_of(shape, torch.bfloat16, CPU) for shape in others}
    assert len(keys | {key, key_of(SHAPE, torch.float16, CPU)}) == len(others) + 2


def test_the_shape_is_that_of_most_layers():
    model = planning.plan(TrainArgs(depth=12), 32768).model
    shape = AttentionShape.of(model, documents=True)
    assert shape == AttentionShape(6, 6, 128, 2048, 512, True)


@pytest.mark.parametrize("documents", [False, True])
def test_what_is_timed_is_forward_and_backward_of_the_shape(documents):
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=4, sequence_len=1024, window=32, documents=documents)
    gradients = one_pass("sdpa", shape, torch.float32, CPU)()
    assert [x.shape for x in gradients] == [(16, 1024, 4, 4), (16, 1024, 2, 4), (16, 1024, 2, 4)]
    keys_seen = gradients[1].abs().sum((0, 2, 3)) > 0
    assert keys_seen.all()


def test_the_measurement_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one_pass("sdpa", SHAPE, torch.float32, CPU)()
    assert torch.equal(torch.rand(3), expected)


def test_where_one_backend_is_possible_nothing_is_measured():
    precision, line = choose_precision(CPU, shape=SHAPE, world=World.single_process())
    assert precision.attention == "sdpa"
    assert "needs a CUDA GPU" in line
    assert not files.attention_times_file().exists()
