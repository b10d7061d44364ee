"""CORE's scoring against a plain scorer, one option at a time, and against answers worked by hand."""

import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dev.bench import naive_core
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.common.stop_signals import Stopped
from nanochat.config.model_config import GPTConfig
from nanochat.distributed.world import World
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core import evaluate, scoring
from nanochat.evaluation.core.bundle import Bundle, Example, Task
from nanochat.evaluation.core.prompt_tokens import Prompts
from nanochat.model.gpt import GPT
from nanochat.model.layers import Linear, constant
from nanochat.tokenizer.tokenizer import PATTERN
from tests.bundles import bundle_of

SOLO = World.single_process()


class PairTokenizer:
    """Ids are bytes, pairs of lower-case letters one id: prefixes of texts need not be prefixes of ids."""

    bos_id = 256 + 26 * 26
    vocab_size = bos_id + 1

    def __init__(self, pattern=PATTERN):
        self.pattern = pattern  # ours lets shots be joined as ids

    def encode(self, text, bos=False):
        data, ids = text.encode("utf-8"), [self.bos_id] * bos
        place = 0
        while place < len(data):
            a, b = data[place] - 97, data[place + 1] - 97 if place + 1 < len(data) else -1
            pair = 0 <= a < 26 and 0 <= b < 26
            ids.append(256 + 26 * a + b if pair else data[place])
            place += 1 + pair
        return ids

    def encode_batch(self, texts, num_threads=None):
        ids = [self.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, ids)])
        return np.array([token for part in ids for token in part], dtype=np.uint32), offsets


def tiny_gpt(vocab_size, sequence_len=256):
    config = GPTConfig(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_kv_head=2,
        head_dim=16,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
    )
    model = GPT(config, Precision(torch.float32, "sdpa"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.init_weights(0)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return PairTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_gpt(tokenizer.vocab_size)


def assert_same(model, tokenizer, bundle, max_per_task, variant="nanochat", **options):
    """The answers equal those of the plain scorer (dev/bench/naive_core.py); returns the result."""
    scorer = scoring.GPTScorer(model)
    options = {"world": SOLO, "variant": variant, **options}
    result = evaluate.evaluate(scorer, tokenizer, bundle, max_per_task=max_per_task, **options)
    context = model.config.sequence_len
    crop = options.get("crop_tokens", 10 * context if variant == "nanochat" else context)
    got = iter(result.predictions)
    for task in core_bundle.load_tasks(bundle):
        examples = core_bundle.load_examples(bundle, task)
        with scorer.room(crop):
            plain = list(naive_core.answers(model, tokenizer, task, examples, max_per_task, crop, variant))
        for index, expected in enumerate(plain):
            found = next(got)
            assert (found.task, found.index, found.line) == (task.label, index, expected.line)
            np.testing.assert_allclose(found.losses, expected.losses, atol=2e-5)
            assert found.cropped == expected.cropped, (task.label, index)
            if found.answer != expected.answer:  # only a tie may fall otherwise, by rounding
                assert task.kind != "language_modeling", (task.label, index)
                tied = [expected.losses[found.answer], expected.losses[expected.answer]]
                assert tied[0] == pytest.approx(tied[1], abs=1e-6), (task.label, index)
    assert next(got, None) is None
    return result


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "three",
    "red",
    "birds",
    "near",
    "old",
    "trees",
    "skies",
]


def small_bundle(examples=24):
    """Three tasks of random words with corner cases: prefix and equal choices, spaces, long prompts."""
    rng = random.Random(5)

    def words(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    mc = [
        {"query": words(2, 9), "choices": [words(1, 4) for _ in range(4)], "gold": n % 4}
        for n in range(examples)
    ]
    mc[3]["choices"] = ["red", "red birds", "cat", "mat"]
    mc[4]["choices"] = ["cat", "red birds", "red", "mat"]
    mc[5]["choices"] = [" the mat", "the mat", "the mat", "a mat"]
    mc[6]["choices"] = ["same", "same", "same", "same"]
    mc[7]["query"] = words(60, 60)
    schema = [
        {"context_options": [words(2, 6), words(2, 6)], "continuation": words(2, 5), "gold": n % 2}
        for n in range(examples)
    ]
    schema[2]["context_options"] = ["a cat", "a cat"]
    lm = [{"context": words(3, 20) + " ", "continuation": words(1, 2)} for _ in range(examples)]
    kinds = {"mc": "multiple_choice", "schema": "schema", "lm": "language_modeling"}
    shots = {"mc": 2, "schema": 0, "lm": 1}
    entries = "".join(
        f"- {{label: {name}, dataset_uri: {name}.jsonl, num_fewshot: {shots[name]}, icl_task_type: {kind}}}\n"
        for name, kind in kinds.items()
    )
    texts = {
        f"eval_data/{name}.jsonl": records for name, records in (("mc", mc), ("schema", schema), ("lm", lm))
    }
    return bundle_of(
        "small",
        {
            "core.yaml": f"icl_tasks:\n{entries}",
            "eval_meta_data.csv": "Eval Task,Random baseline\nmc,25\nschema,50\nlm,0\n",
            **{
                name: "".join(json.dumps(record) + "\n" for record in records)
                for name, records in texts.items()
            },
        },
    )


@pytest.mark.parametrize("batch_tokens", [1, 300, 16384])
@pytest.mark.parametrize("variant", ["nanochat", "dclm"])
def test_batches_of_any_size_answer_as_one_option_at_a_time(model, tokenizer, batch_tokens, variant):
    result = assert_same(model, tokenizer, small_bundle(), 0, variant, batch_tokens=batch_tokens)
    if variant == "dclm":
        return
    assert [task.examples for task in result.tasks] == [24, 24, 24]
    assert len({prediction.answer for prediction in result.predictions[:24]}) > 2
    assert any(math.isnan(loss) for prediction in result.predictions for loss in prediction.losses)


@pytest.mark.parametrize("variant", ["nanochat", "dclm"])
def test_a_lone_example_has_no_shots_and_no_separator_before_it(model, tokenizer, variant):
    assert_same(model, tokenizer, small_bundle(), 1, variant)


def test_a_cut_list_draws_its_shots_from_itself(model, tokenizer):
    result = assert_same(model, tokenizer, small_bundle(), 5)
    assert [task.examples for task in result.tasks] == [5, 5, 5]
    # Fewer examples than shots: all others are shown.
    assert_same(model, tokenizer, small_bundle(), 2)


def test_long_prompts_lose_their_beginning_and_are_counted(model, tokenizer):
    result = assert_same(model, tokenizer, small_bundle(), 0, crop_tokens=60)
    assert result.crop_tokens == 60
    cropped = {task.label: task.cropped_prompts for task in result.tasks}
    assert cropped["mc"] > 4
    assert cropped["lm"] > 0
    assert cropped == {
        label: sum(prediction.cropped for prediction in result.predictions if prediction.task == label)
        for label in cropped
    }


def test_a_continuation_longer_than_the_context_is_scored_from_its_second_token_on(model, tokenizer):
    assert_same(model, tokenizer, small_bundle(), 0, crop_tokens=3)


def test_equal_options_tie_exactly_whatever_batch_they_fall_in(model, tokenizer):
    result = evaluate.evaluate(
        scoring.GPTScorer(model), tokenizer, small_bundle(), world=SOLO, batch_tokens=1
    )
    by_line = {(prediction.task, prediction.line): prediction for prediction in result.predictions}
    ties = by_line["mc", 6].losses
    assert ties[1] == ties[2]
    assert by_line["schema", 3].losses[0] == by_line["schema", 3].losses[1]
    assert by_line["schema", 3].answer == 0


class Fixed:
    """A model whose hidden state is one-hot in the current token; its head is a table of bigram logits."""

    class config:
        sequence_len = 64
        vocab_size = 0
        softcap = 15.0

    cos = sin = torch.empty(640)
    block_masks: dict = {}

    def __init__(self, table):
        self.head = Linear(*table.shape, constant(0.0))
        self.head.weight.data = table
        self.config = type("C", (Fixed.config,), {"vocab_size": len(table)})

    def __call__(self, ids, cache=None):
        return torch.nn.functional.one_hot(ids, self.config.vocab_size).float()


def bigram_model(tokenizer, probabilities):
    """P(next | current) as given, the rest of the mass spread evenly."""
    size = tokenizer.vocab_size
    table = torch.full((size, size), 1.0 / size)
    for (current, following), p in probabilities.items():
        table[ord(following), ord(current)] = p
    logits = table.log()
    # Undo the softcap, so that the capped logits are the logarithms.
    return Fixed(15 * torch.atanh(logits / 15))


def mm_flops(counter):
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


def test_operations_are_those_that_torch_counts(model):
    scorer = scoring.GPTScorer(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = scorer.read(torch.ones(2, 12, dtype=torch.int64))
        scorer.losses(hidden[:, :3].flatten(0, 1), torch.ones(6, dtype=torch.int64), True)
    assert scorer.flops(24, 6) == mm_flops(counter)


def test_operations_of_an_evaluation_are_those_that_torch_counts(tokenizer):
    """With shared beginnings, padding and outputs that nobody asks for."""
    model = tiny_gpt(tokenizer.vocab_size, sequence_len=512)
    scorer = scoring.GPTScorer(model)
    with FlopCounterMode(display=False) as counter:
        result = evaluate.evaluate(scorer, tokenizer, stories_bundle(), world=SOLO)
    assert result.computed_tokens > result.scored_tokens > 0
    assert scorer.flops(result.computed_tokens, result.scored_tokens) == mm_flops(counter)


def test_positions_are_counted_where_they_are_read_and_where_they_are_scored(model, tokenizer):
    read, scored = [], []

    class Counted(scoring.GPTScorer):
        def read(self, ids, prefix=None):
            read.append(ids.numel() + (prefix[0].numel() if prefix else 0))
            return super().read(ids, prefix)

        def losses(self, hidden, targets, with_argmax):
            scored.append(len(targets))
            return super().losses(hidden, targets, with_argmax)

    result = evaluate.evaluate(Counted(model), tokenizer, small_bundle(), world=SOLO)
    assert (result.computed_tokens, result.scored_tokens) == (sum(read), sum(scored))


@pytest.mark.parametrize("batch_tokens", [64, 1000, 100_000])
def test_no_pass_of_several_rows_exceeds_the_tokens_asked_for(model, tokenizer, batch_tokens):
    sizes = []

    class Watched(scoring.GPTScorer):
        def read(self, ids, prefix=None):
            sizes.append((len(ids), len(ids) * (ids.size(1) + (prefix[0].size(1) if prefix else 0))))
            return super().read(ids, prefix)

    evaluate.evaluate(Watched(model), tokenizer, small_bundle(), world=SOLO, batch_tokens=batch_tokens)
    bound = min(batch_tokens, scoring.MOST_TOKENS["cpu"])
    assert max(tokens for rows, tokens in sizes if rows > 1) <= bound


def test_answers_worked_by_hand(tokenizer):
    """Upper-case letters are one id each. After a space B is likelier than C; after C comes D."""
    model = bigram_model(tokenizer, {("A", " "): 0.9, (" ", "B"): 0.6, (" ", "C"): 0.2, ("C", "D"): 0.99})
    entries = "- {label: mc, dataset_uri: m, num_fewshot: [0], icl_task_type: multiple_choice}\n"
    entries += "- {label: lm, dataset_uri: l, num_fewshot: [0], icl_task_type: language_modeling}\n"
    texts = {
        "core.yaml": "icl_tasks:\n" + entries,
        "eval_meta_data.csv": "Eval Task,Random baseline\nmc,50\nlm,0\n",
        "eval_data/m": '{"query": "A", "choices": ["CD", "B"], "gold": 0}\n',
        "eval_data/l": '{"context": "A", "continuation": "B"}\n{"context": "A", "continuation": "CD"}\n',
    }
    result = evaluate.evaluate(scoring.GPTScorer(model), tokenizer, bundle_of("hand", texts), world=SOLO)
    choice, *words = result.predictions
    # Probabilities are the table's over its column sums.
    size, rest = tokenizer.vocab_size, 1 / tokenizer.vocab_size
    space, c = 0.8 + (size - 2) * rest, 0.99 + (size - 1) * rest
    # "CD" costs (-ln 0.2 - ln 0.99) / 2, "B" -ln 0.6: by the mean "B" wins although D is nearly certain.
    expected = [-(math.log(0.2 / space) + math.log(0.99 / c)) / 2, -math.log(0.6 / space)]
    np.testing.assert_allclose(choice.losses, expected, rtol=1e-4)
    assert (choice.answer, choice.gold) == (expected.index(min(expected)), 0)
    # The likeliest token after the space is B, so only that word is produced.
    assert {prediction.line: prediction.answer for prediction in words} == {1: 0, 2: -1}
    assert [task.accuracy for task in result.tasks] == [0.0, 0.5]
    assert result.core_metric == pytest.approx((-1.0 + 0.5) / 2)


def rows_of(tokenizer, task, example):
    return Prompts(tokenizer, task, [example], "nanochat", scoring.Clock()).spans(0, 99)


def test_spans_are_the_common_prefix_and_suffix(tokenizer):
    example = Example(("AB", "XAB"), ("C D",), 0, 1)
    rows = rows_of(tokenizer, Task("s", "schema", 0, " ", "f", 50), example)
    # BOS A B space C space D against BOS X A B space C space D: the suffix reaches into the context.
    assert [(row.start, len(row.ids)) for row in rows] == [(1, 7), (2, 8)]
    example = Example(("Q",), ("AB", "AC"), 0, 1)
    rows = rows_of(tokenizer, Task("m", "multiple_choice", 0, " ", "f", 25), example)
    # BOS Q space A B: the first letter of the choices is shared and not scored.
    assert [(row.start, len(row.ids)) for row in rows] == [(4, 5), (4, 5)]
    example = Example(("Q ",), ("AB",), 0, 1)
    rows = rows_of(tokenizer, Task("l", "language_modeling", 0, "\nA: ", "f", 0), example)
    # BOS Q newline A colon | space A B.
    assert [(row.start, len(row.ids)) for row in rows] == [(5, 8)]


def test_every_rank_reports_the_sum_of_what_the_ranks_found(model, tokenizer):
    whole = evaluate.evaluate(scoring.GPTScorer(model), tokenizer, small_bundle(), world=SOLO)
    tables = []

    class Rank(World):
        def all_reduce_sum(self, tensor):
            if tensor.dim() == 2:
                tables.append(tensor.clone())
            return tensor

    for rank in range(3):
        world = Rank(rank=rank, size=3, device=torch.device("cpu"), backend=None)
        evaluate.evaluate(scoring.GPTScorer(model), tokenizer, small_bundle(), world=world)
    for task in range(3):
        total = tables[task] + tables[3 + task] + tables[6 + task]
        answers = [prediction.answer for prediction in whole.predictions[24 * task : 24 * task + 24]]
        assert total[:, 0].tolist() == answers
        expected = [prediction.losses for prediction in whole.predictions[24 * task : 24 * task + 24]]
        np.testing.assert_allclose(total[:, 3 : 3 + len(expected[0])], expected, atol=2e-5)


def test_scores_are_told_task_by_task_and_all_files_are_checked_first(model, tokenizer):
    told = []
    bundle = small_bundle(12)
    result = evaluate.evaluate(scoring.GPTScorer(model), tokenizer, bundle, world=SOLO, on_task=told.append)
    assert tuple(told) == result.tasks

    def read(member):
        return [b"{"] if member == "eval_data/lm.jsonl" else bundle.pieces(member)

    told.clear()
    with pytest.raises(UserError, match=r"eval_data/lm.jsonl:1"):
        evaluate.evaluate(
            scoring.GPTScorer(model), tokenizer, Bundle("bad", read), world=SOLO, on_task=told.append
        )
    assert told == []


def test_a_stop_between_tasks_drops_the_scores(model, tokenizer):
    told = []
    with pytest.raises(Stopped):
        evaluate.evaluate(
            scoring.GPTScorer(model),
            tokenizer,
            small_bundle(12),
            world=SOLO,
            on_task=told.append,
            stop_requested=lambda: len(told) == 1,
        )
    assert len(told) == 1


def test_the_result_has_the_fields_of_base_eval_json(model, tokenizer):
    fields = evaluate.evaluate(scoring.GPTScorer(model), tokenizer, small_bundle(12), world=SOLO).as_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert set(fields) >= {"core_metric", "core_stderr", "tasks", "core_seconds", "examples_per_second"}
    assert set(fields["tasks"]) == {"mc", "schema", "lm"}
    assert set(fields["tasks"]["mc"]) >= {"accuracy", "centered", "stderr", "examples"}


def test_bundles_are_found_by_path_by_name_or_in_the_base_directory(tmp_path, base_dir):
    assert "import_name" in evaluate.find_bundle("mini").text("core.yaml")
    with pytest.raises(UserError, match="no eval bundle.*--eval-bundle mini"):
        evaluate.find_bundle("")
    with pytest.raises(UserError, match="no such eval bundle"):
        evaluate.find_bundle(str(tmp_path / "absent"))
    folder = base_dir / "eval_bundle"
    folder.mkdir(parents=True)
    (folder / "core.yaml").write_text("icl_tasks: []")
    assert evaluate.find_bundle("").text("core.yaml") == "icl_tasks: []"
    assert evaluate.find_bundle(str(folder)).text("core.yaml") == "icl_tasks: []"


class Gpt2Tokenizer:
    """GPT-2's own vocabulary by tiktoken."""

    bos_id, vocab_size = 50256, 50257
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self, folder):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        self.encoding = tiktoken.Encoding(
            "gpt2", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + self.encoding.encode_ordinary(text)

    encode_batch = PairTokenizer.encode_batch


@pytest.mark.slow
def test_the_real_bundle_answers_as_one_option_at_a_time(shared_data):
    """Every task of the public bundle, its prompts whole: none is longer than the model can read."""
    tokenizer = Gpt2Tokenizer(shared_data / "bpe")
    model = tiny_gpt(tokenizer.vocab_size)
    bundle = core_bundle.open_bundle(shared_data / "eval_bundle.zip")
    result = assert_same(model, tokenizer, bundle, 3)
    assert len(result.tasks) == 22
    beyond = {task.label: task.beyond_prompts for task in result.tasks}
    assert (beyond["squad"], beyond["copa"]) == (3, 0)
    assert sum(task.cropped_prompts for task in result.tasks) == 0


def test_with_keep_going_a_faulty_task_is_left_out_and_there_is_no_core(model, tokenizer):
    bundle = small_bundle(12)

    def read(member):
        return [b"{"] if member == "eval_data/lm.jsonl" else bundle.pieces(member)

    scorer = scoring.GPTScorer(model)
    result = evaluate.evaluate(scorer, tokenizer, Bundle("bad", read), world=SOLO, keep_going=True)
    assert [task.label for task in result.tasks] == ["mc", "schema"]
    assert result.core_metric is None
    assert "eval_data/lm.jsonl:1" in result.faults["lm"]


def stories_bundle():
    """Questions about few long stories, each with the turns before it: what is shared is most of it."""
    rng = random.Random(6)
    records = []
    for number in range(4):
        text = f"story {number} " + " ".join(rng.choices(WORDS, k=60))
        for _ in range(6):
            question, answer = " ".join(rng.choices(WORDS, k=4)), rng.choice(WORDS)
            records.append({"context": f"{text}\nLast question: {question}\nA:", "continuation": answer})
            text += f"\nQuestion: {question}\nA: {answer}"
    return bundle_of(
        "stories",
        {
            "core.yaml": "icl_tasks: [{label: s, dataset_uri: s, num_fewshot: 0, "
            "icl_task_type: language_modeling}]",
            "eval_meta_data.csv": "Eval Task,Random baseline\ns,0\n",
            "eval_data/s": "".join(json.dumps(record) + "\n" for record in records),
        },
    )


def test_stories_are_read_once_for_all_their_questions(tokenizer):
    model = tiny_gpt(tokenizer.vocab_size, sequence_len=512)
    result = assert_same(model, tokenizer, stories_bundle(), 0)
    assert result.tasks[0].passages == 4
    alone = assert_same(model, tokenizer, stories_bundle(), 0, batch_tokens=1)
    assert result.computed_tokens < 0.6 * alone.computed_tokens


def test_prompts_of_nanochat_are_read_whole_whatever_the_context(tokenizer):
    model = tiny_gpt(tokenizer.vocab_size, sequence_len=64)
    tables = model.cos, model.sin
    result = assert_same(model, tokenizer, small_bundle(), 0)
    assert (result.crop_tokens, result.context_tokens) == (None, 64)
    assert sum(task.cropped_prompts for task in result.tasks) == 0
    assert sum(task.beyond_prompts for task in result.tasks) > 20
    assert "were longer than the context of 64 tokens and read whole" in result.describe_length()
    assert (model.cos, model.sin) == tables  # the very tensors: what is compiled knows them


def test_cropping_is_an_option_that_the_scores_say(tokenizer):
    model = tiny_gpt(tokenizer.vocab_size, sequence_len=64)
    result = assert_same(model, tokenizer, small_bundle(), 0, crop_tokens=64)
    cropped = sum(task.cropped_prompts for task in result.tasks)
    assert cropped > 20
    assert f"{cropped} prompts were cropped to their last 64 tokens, without BOS" in result.describe_length()
    assert (result.as_dict()["crop_tokens"], result.as_dict()["context_tokens"]) == (64, 64)
    assert assert_same(model, tokenizer, small_bundle(), 0, variant="dclm").crop_tokens == 64


@pytest.mark.parametrize("crop_tokens", [-1, 0, 1, 641, 2**40])
def test_a_crop_that_cannot_be_is_refused(tokenizer, crop_tokens):
    scorer = scoring.GPTScorer(tiny_gpt(tokenizer.vocab_size, sequence_len=64))
    with pytest.raises(UserError, match=f"--core-crop-tokens={crop_tokens}: expected 2 .* to 640"):
        evaluate.evaluate(scorer, tokenizer, small_bundle(), world=SOLO, crop_tokens=crop_tokens)


def test_a_prompt_that_no_table_reaches_is_cropped_to_what_can_be_read(tokenizer):
    """One long prompt must not end a scoring of hours, nor a training that scores as it goes."""
    model = tiny_gpt(tokenizer.vocab_size, sequence_len=8)
    result = assert_same(model, tokenizer, small_bundle(), 0)
    assert result.crop_tokens == 80
    cropped = sum(task.cropped_prompts for task in result.tasks)
    assert 0 < cropped < sum(task.beyond_prompts + task.cropped_prompts for task in result.tasks)
    assert f"{cropped} prompts were cropped to their last 80 tokens" in result.describe_length()


def test_each_score_says_which_questions_were_asked(model, tokenizer):
    bundle = small_bundle()
    result = evaluate.evaluate(scoring.GPTScorer(model), tokenizer, bundle, world=SOLO)
    for task in core_bundle.load_tasks(bundle):
        data = b"".join(bundle.pieces(task.member))
        assert result.as_dict()["tasks"][task.label]["sha256"] == hashlib.sha256(data).hexdigest()


def test_trivial_baselines_need_no_model():
    examples = [Example(("q",), ("aa", "b", "c"), gold, gold) for gold in (0, 0, 1, 2, 0)]
    assert core_bundle.trivial_baselines(examples) == {"majority": 0.6, "longest": 0.6, "shortest": 0.2}
    schema = [Example(("xx", "y"), ("z",), 1, 1)]
    assert core_bundle.trivial_baselines(schema) == {"majority": 1.0, "longest": 0.0, "shortest": 1.0}
    words = [Example(("q",), (text,), 0, 1) for text in ("yes", " yes", "no", "no!")]
    assert core_bundle.trivial_baselines(words) == {"majority": 0.5}
