"""Our checkpoints in EleutherAI's lm-evaluation-harness. Needs the extra `eval`.

    lm = harness.build("d12")
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

Texts begin with BOS, as documents do in training. What is longer than the context loses its beginning; the
harness's sums of log-probabilities are not CORE's means per token, so the two agree in losses, not in scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.engine import Engine, Sampling
from nanochat.evaluation.core.batching import Span
from nanochat.evaluation.core.scoring import Clock, GPTScorer, score_spans
from nanochat.model import attention_backends
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import Tokenizer

MAX_GENERATED = 256  # tokens, where a task does not say


class Requests:
    """The three kinds of requests of the harness, on token ids and texts."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_tokens: int = 16384) -> None:
        """Hold a model; `batch_tokens` bounds the positions of a forward pass."""
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.context = model.config.sequence_len

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation after its context, and whether it is greedy.

        Args:
            pairs: ids of a context (one or more) and of its continuation (one or more).

        Raises:
            UserError: a continuation without tokens, which would be certain whatever it is.
        """
        spans = []
        for context, continuation in pairs:
            if not context or not continuation:
                which = "continuation" if context else "context"
                raise UserError(
                    f"a request has a {which} without tokens, and the probability of nothing tells nothing. "
                    "Leave the request out, or begin its context with a BOS."
                )
            # The last token is only a target, so one more than the context fits.
            ids = np.array([*context, *continuation], np.int32)[-(self.context + 1) :]
            spans.append(Span(ids, max(1, len(ids) - len(continuation)), len(ids)))
        scorer = GPTScorer(self.model)
        found = score_spans(scorer, spans, self.batch_tokens, with_argmax=True, clock=Clock())
        return [
            (-nats * (span.end - span.start), greedy)
            for span, (nats, greedy) in zip(spans, found, strict=True)
        ]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, after a BOS, and of its continuation.

        Where a token would reach across the join, the two are encoded apart: cut there, the continuation
        would lose its first characters, or all of them.
        """
        before = self.tokenizer.encode(context, bos=True)
        whole = self.tokenizer.encode(context + continuation, bos=True)
        if whole[: len(before)] != before:
            return before, self.tokenizer.encode(continuation)
        return before, whole[len(before) :]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of whole texts: every token once, in windows of the context.

        The first window begins with BOS, each other one with the last token of the one before it; the last
        one reaches back as far as the context allows, as in the harness's own models.
        """
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for place, text in enumerate(texts):
            ids = self.tokenizer.encode(text, bos=True)
            for start in range(0, len(ids) - 1, self.context):
                end = min(start + self.context, len(ids) - 1)
                windows.append((ids[max(0, end - self.context) : start + 1], ids[start + 1 : end + 1]))
                owners.append(place)
        totals = [0.0] * len(texts)
        for place, (nats, _) in zip(owners, self.log_likelihoods(windows), strict=True):
            totals[place] += nats
        return totals

    def generate(self, prompt: str, options: dict[str, Any]) -> str:
        """Continue a prompt until one of the stop texts, which is cut off.

        A prompt that leaves too little room loses its beginning, with a warning; at least half of the context
        is the prompt's, and what is added ends where the context does.

        Raises:
            UserError: `max_gen_toks` is negative.
        """
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        asked = options.get("max_gen_toks")
        count = MAX_GENERATED if asked is None else int(asked)
        if count < 0:
            raise UserError(f"max_gen_toks is {count}: expected 0 or more.")
        if count == 0:
            return ""
        ids, room = self.tokenizer.encode(prompt, bos=True), min(count, self.context // 2)
        if len(ids) > self.context - room:
            kept = self.context - room
            warnings.warn(f"a prompt of {len(ids)} tokens keeps its last {kept}", stacklevel=2)
            ids = ids[-kept:]
        engine, text = Engine(self.model, self.tokenizer), ""
        for piece in engine.stream(ids, Sampling(count, temperature)):
            text += piece
            found = [text.index(stop) for stop in stops if stop and stop in text]
            if found:
                return text[: min(found)]
        return text


def build(run: str, *, step: int | None = None, device: str = "auto", batch_tokens: int = 16384) -> Any:
    """A model of a run as `lm_eval` takes it.

    Args:
        run: name of the run.
        step: checkpoint; by default the newest.
        device: where to compute.
        batch_tokens: most positions of a forward pass.

    Raises:
        UserError: lm_eval is missing, or the run cannot be loaded.
    """
    where = machine.detect_device(device)
    precision, _ = attention_backends.choose_precision(where)
    model, tokenizer, _ = checkpoint_state.load_model(run, step, device=where, precision=precision)
    return wrap(Requests(model, tokenizer, batch_tokens))


def wrap(requests: Requests) -> Any:
    """An `lm_eval` model that answers by `requests`.

    Raises:
        UserError: lm_eval is missing.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError('the harness is missing: pip install "nanochat[eval]".') from None

    class NanochatLM(TemplateLM):  # type: ignore[misc]
        """Encodes with a BOS before every text and hands the rest over."""

        eot_token_id = requests.tokenizer.bos_id
        max_length = requests.context
        max_gen_toks = MAX_GENERATED
        tokenizer_name = requests.tokenizer.fingerprint

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return requests.tokenizer.encode(string, bos=add_special_tokens is not False)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            spaces = len(context) - len(context.rstrip())  # they belong to the first token of what follows
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            return requests.encode_pair(context, continuation)

        def _loglikelihood_tokens(self, asked: Any, **_: Any) -> list[tuple[float, bool]]:
            return requests.log_likelihoods([(context, continuation) for _, context, continuation in asked])

        def loglikelihood_rolling(self, asked: Any, disable_tqdm: bool = False) -> list[float]:
            return requests.rolling([request.args[0] for request in asked])

        @torch.no_grad()
        def generate_until(self, asked: Any, disable_tqdm: bool = False) -> list[str]:
            return [requests.generate(*request.args) for request in asked]

    return NanochatLM()
