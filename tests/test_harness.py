"""lm-evaluation-harness on the exported folder, against our own scoring of the same continuations."""

import json

import numpy as np
import pytest

from nanochat import export
from nanochat.engine import Engine, Sampling
from nanochat.evaluation.core.batching import Span
from nanochat.evaluation.core.scoring import Clock, GPTScorer, score_spans
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.test_core_eval import WORDS, tiny_gpt

CONTEXT = 64
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {name}
doc_to_text: "{{{{query}}}}"
doc_to_target: {target}
"""
TASKS = {
    "multiple_choice": ("gold", 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'),
    "loglikelihood": ('" {{choices[0]}}"', "metric_list: [{metric: acc}]\n"),
    "generate_until": (
        '"{{choices[0]}}"',
        "generation_kwargs: {until: [never], max_gen_toks: 8, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n",
    ),
    "loglikelihood_rolling": ('"{{query}}"', "metric_list: [{metric: bits_per_byte}]\n"),
}
LINES = [
    {
        "query": " ".join(WORDS[n : n + 4] * (1 + 12 * (n == 3))),  # one is longer than the context
        "choices": [" ".join((WORDS[n % 5], WORDS[-n % 7])), WORDS[-n % 7], "birds"],
        "gold": n % 3,
    }
    for n in range(9)
]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = Tokenizer.train([" ".join(WORDS) + "\nQ: A: 12."], 300)
    return tiny_gpt(tokenizer.vocab_size, sequence_len=CONTEXT), tokenizer


def ours(model, tokenizer, query, continuation):
    """Sum of the log-probabilities by the scorer of CORE, and whether all tokens are the likeliest."""
    context = tokenizer.encode(query, bos=True)
    ids = [*context, *tokenizer.encode(query + continuation, bos=True)[len(context) :]]
    count, kept = len(ids) - len(context), np.array(ids[-(CONTEXT + 1) :], np.int32)
    spans = [Span(kept, len(kept) - count, len(kept))]
    [(nats, greedy)] = score_spans(GPTScorer(model), spans, 4096, with_argmax=True, clock=Clock())
    return -nats * count, greedy


def harness(folder, tmp_path, monkeypatch, names, options=""):
    """For each task its samples in the order of LINES, and its scores, as `lm_eval --model hf` gives them."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name in names:
        target, rest = TASKS[name]
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, target=target) + rest)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32{options}",
        tasks=list(names),
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {
        name: [one["filtered_resps"] for one in sorted(found, key=lambda one: one["doc_id"])]
        for name, found in results["samples"].items()
    }
    return samples, results["results"]


@pytest.mark.slow
def test_lm_eval_on_the_exported_folder_gives_our_numbers(model_and_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    model, tokenizer = model_and_tokenizer
    export.write_hf(model, tokenizer, tmp_path / "hf")
    names = ("multiple_choice", "loglikelihood", "generate_until")
    samples, scores = harness(tmp_path / "hf", tmp_path, monkeypatch, names)
    right = 0
    for line, found in zip(LINES, samples["multiple_choice"], strict=True):
        expected = [ours(model, tokenizer, line["query"], f" {choice}") for choice in line["choices"]]
        for (value, greedy), (nats, likeliest) in zip(found, expected, strict=True):
            assert float(value) == pytest.approx(nats, abs=1e-4)
            assert greedy == likeliest
        right += expected.index(max(expected)) == line["gold"]
    assert scores["multiple_choice"]["acc,none"] == pytest.approx(right / len(LINES))
    for line, [(value, _)] in zip(LINES, samples["loglikelihood"], strict=True):
        expected, _ = ours(model, tokenizer, line["query"], f" {line['choices'][0]}")
        assert float(value) == pytest.approx(expected, abs=1e-4)
    prompts = [tokenizer.encode(line["query"], bos=True)[-(CONTEXT - 8) :] for line in LINES]
    done = Engine(model, tokenizer).generate(prompts, Sampling(8, temperature=0))
    for [completion], [text] in zip(done, samples["generate_until"], strict=True):
        assert text == tokenizer.decode(list(completion.ids))


@pytest.mark.slow
def test_a_whole_text_needs_the_option_that_leaves_the_second_bos_out(
    model_and_tokenizer, tmp_path, monkeypatch
):
    """The harness begins a whole text with a BOS by itself: with the tokenizer's there would be two."""
    pytest.importorskip("lm_eval")
    model, tokenizer = model_and_tokenizer
    export.write_hf(model, tokenizer, tmp_path / "hf")
    rolling = ("loglikelihood_rolling",)
    samples, _ = harness(tmp_path / "hf", tmp_path, monkeypatch, rolling, ",add_bos_token=False")
    for line, [value] in zip(LINES, samples["loglikelihood_rolling"], strict=True):
        if len(tokenizer.encode(line["query"])) <= CONTEXT:
            assert float(value) == pytest.approx(ours(model, tokenizer, "", line["query"])[0], abs=1e-4)
