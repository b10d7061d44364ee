"""The adapter of lm-evaluation-harness, against our own numbers."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dev.bench import naive_core
from nanochat.common.errors import UserError
from nanochat.distributed.world import World
from nanochat.engine import Engine, Sampling
from nanochat.evaluation import lm_eval_harness
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import evaluate, scoring
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.test_core_eval import WORDS, small_bundle, tiny_gpt

LONG = " ".join(WORDS * 9)


@pytest.fixture(scope="module")
def requests():
    tokenizer = Tokenizer.train([" ".join(WORDS) + "\nQ: A: 12."], 300)
    return lm_eval_harness.Requests(tiny_gpt(tokenizer.vocab_size, sequence_len=64), tokenizer)


def plain_nats(requests, ids, start):
    """-log p of ids[start:], one row, all logits."""
    logits = requests.model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return [-logits[t - 1, ids[t]].item() for t in range(start, len(ids))], logits


def test_log_likelihoods_are_sums_over_the_continuation(requests):
    encode = requests.tokenizer.encode
    pairs = [(encode("the cat", bos=True), encode(text)) for text in (" sat on a mat", " sat", " on", " sat")]
    with torch.no_grad():
        for (context, tail), (value, greedy) in zip(pairs, requests.log_likelihoods(pairs), strict=True):
            nats, logits = plain_nats(requests, context + tail, len(context))
            assert value == pytest.approx(-sum(nats), abs=1e-4)
            likeliest = logits[len(context) - 1 :].argmax(-1).tolist()
            assert greedy == (likeliest == tail)


def test_a_context_too_long_loses_its_beginning(requests):
    ids = requests.tokenizer.encode(LONG, bos=True)
    assert len(ids) > 80
    [(value, _)] = requests.log_likelihoods([(ids[:-3], ids[-3:])])
    with torch.no_grad():
        nats, _ = plain_nats(requests, ids[-65:], 62)
    assert value == pytest.approx(-sum(nats), abs=1e-4)


def test_a_rolling_text_is_read_in_windows_and_every_token_counts_once(requests):
    ids = requests.tokenizer.encode(LONG, bos=True)
    expected = 0.0
    with torch.no_grad():
        expected -= sum(plain_nats(requests, ids[:65], 1)[0])
        start = 64
        while start < len(ids) - 1:
            end = min(start + 64, len(ids) - 1)
            window = ids[max(0, end - 64) : end + 1]
            expected -= sum(plain_nats(requests, window, len(window) - (end - start))[0])
            start = end
    short = requests.rolling(["the cat", ""])
    assert requests.rolling([LONG]) == [pytest.approx(expected, abs=1e-3)]
    assert short[0] < 0
    assert short[1] == 0.0


def test_generation_stops_before_the_stop_text(requests):
    free = requests.generate("the cat", {"max_gen_toks": 12})
    assert len(free) > 4
    stop = free[2:4]
    stopped = requests.generate("the cat", {"max_gen_toks": 12, "until": [stop, "never"]})
    assert stopped == free[: free.index(stop)]
    assert requests.generate("the cat", {"max_gen_toks": 12, "until": "never"}) == free
    # Room is made for what is added: the prompt loses its beginning.
    engine = Engine(requests.model, requests.tokenizer)
    [[expected]] = engine.generate([requests.tokenizer.encode(LONG, bos=True)[-59:]], Sampling(5, 0.0))
    assert requests.generate(LONG, {"max_gen_toks": 5}) == requests.tokenizer.decode(expected.ids)


def test_a_continuation_of_no_tokens_is_refused_not_certain(requests):
    ids = requests.tokenizer.encode("the cat", bos=True)
    for pair in ((ids, []), ([], ids)):
        with pytest.raises(UserError, match="without tokens"):
            requests.log_likelihoods([(ids, ids), pair])


def test_a_token_across_the_join_is_cut_there(requests):
    encode = requests.tokenizer.encode
    whole = next(word for word in WORDS if len(encode(" " + word)) == 1 and len(word) > 2)
    context, continuation = "the " + whole[:2], whole[2:]
    assert encode(context + continuation, bos=True)[: len(encode(context, bos=True))] != encode(
        context, bos=True
    )
    assert requests.encode_pair(context, continuation) == (encode(context, bos=True), encode(continuation))
    assert requests.encode_pair("the", " cat") == (encode("the", bos=True), encode(" cat"))
    for context in ("the ca", "a", ""):
        assert requests.encode_pair(context, "t")[1]


def test_a_prompt_keeps_half_of_the_context_however_much_is_asked_for(requests, recwarn):
    prompt = "the cat sat on a mat"
    assert requests.generate(prompt, {"max_gen_toks": 0}) == ""
    free = requests.generate(prompt, {"max_gen_toks": 16})
    assert requests.generate(prompt, {"max_gen_toks": 10_000}).startswith(free)
    assert requests.generate(prompt, {}).startswith(free)  # 256 tokens by default, of a context of 64
    assert not recwarn.list
    with pytest.warns(UserWarning, match="keeps its last 32"):
        requests.generate(LONG, {"max_gen_toks": 64})
    with pytest.raises(UserError, match="max_gen_toks is -1"):
        requests.generate(prompt, {"max_gen_toks": -1})


def test_the_harness_gets_the_losses_that_core_gets(requests):
    """Multiple choice without shots: the harness's sum over a choice is our mean times its tokens."""
    pytest.importorskip("lm_eval")
    lm = lm_eval_harness.wrap(requests)
    bundle = small_bundle(12)
    task = next(task for task in core_bundle.load_tasks(bundle) if task.kind == "language_modeling")
    scorer = scoring.GPTScorer(requests.model)
    found = evaluate.evaluate(scorer, requests.tokenizer, bundle, world=World.single_process())
    ours = {one.line: one for one in found.predictions if one.task == task.label}
    asked, counts, lines = [], [], []
    for item, shots in naive_core.ask(task, core_bundle.load_examples(bundle, task), 0, "nanochat"):
        context = "".join(f"{s.contexts[0].strip()} {s.continuations[0]}\n\n" for s in shots)
        context += item.contexts[0].strip()
        asked.append(SimpleNamespace(args=(context, " " + item.continuations[0])))
        counts.append(len(requests.tokenizer.encode(" " + item.continuations[0])))
        lines.append(item.line)
    same = 0
    for line, count, (value, greedy) in zip(
        lines, counts, lm.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        if ours[line].cropped:
            continue  # the harness keeps a token more
        assert value == pytest.approx(-ours[line].losses[0] * count, abs=1e-3)
        assert greedy == (ours[line].answer == 0)
        same += 1
    assert same > 5


def test_lm_eval_runs_a_task_with_our_model(requests, tmp_path, monkeypatch):
    """Its accuracy on a file of choices is that of the sums computed here."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lines = [
        {
            "query": " ".join(WORDS[n : n + 4]),
            "choices": [WORDS[n % 5], WORDS[-n % 7], "birds"],
            "gold": n % 3,
        }
        for n in range(9)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "choices.yaml").write_text(
        f"task: choices\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'choices.jsonl'}}}\n"
        "output_type: multiple_choice\ntest_split: train\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]\n"
    )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm_eval_harness.wrap(requests), tasks=["choices"], task_manager=manager, bootstrap_iters=0
    )
    right = 0
    for line in lines:
        context = requests.tokenizer.encode(line["query"], bos=True)
        sums = [
            requests.log_likelihoods([(context, requests.tokenizer.encode(" " + choice))])[0][0]
            for choice in line["choices"]
        ]
        right += sums.index(max(sums)) == line["gold"]
    assert found["results"]["choices"]["acc,none"] == pytest.approx(right / 9)
    assert math.isfinite(found["results"]["choices"]["acc,none"])
