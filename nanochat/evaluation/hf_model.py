"""Hugging Face causal language models as CORE scorers. Needs the extra `eval`.

They go through the same code as our own models, so that the figures can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanochat.common.errors import UserError

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx")
DEFAULT_CONTEXT = 2048  # where a model's config names none
# Logits held at a time: 2^27 are half a GB in fp32.
CHUNK_ELEMENTS = 1 << 27
# Of the largest logit: two ways to compute the same in bf16 differ by less, a scale or a cap by more.
PROBE_TOLERANCE = 0.02


class HFScorer:
    """A model of transformers as a core.scoring.Scorer; its `read` gives what its head takes."""

    def __init__(self, model: Any) -> None:
        """Take a model, and find out what it allows: its head by itself, and rows that go on from a cache."""
        self.model, self.device = model.eval(), model.device
        self.head = model.get_output_embeddings()
        self.base = None if self.head is None or model.base_model is model else model.base_model
        lengths = (getattr(model.config, name, None) for name in CONTEXT_NAMES)
        # A model with a table of positions cannot read beyond its context.
        self.context_tokens = next((n for n in lengths if isinstance(n, int)), DEFAULT_CONTEXT)
        self.longest_tokens = self.context_tokens
        self._has_cache = False
        self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        """Some models scale or cap their logits, or have no cache of keys: then they are read as a whole."""
        ids = torch.arange(1, 17, device=self.device)[None] % int(self.model.config.vocab_size)
        logits = self.model(input_ids=ids).logits.float()

        def differs(hidden: Tensor, first: int) -> bool:
            computed, wanted = self.head(hidden).float(), logits[:, first:]
            tolerance = float(logits.abs().max()) * PROBE_TOLERANCE
            return (
                computed.shape[1:] != wanted.shape[1:] or float((computed - wanted).abs().max()) > tolerance
            )

        if self.base is None or differs(self.read(ids), 0):
            self.base = None
            return
        self._has_cache = True
        try:
            prefix = ids[:, :9], torch.zeros(2, dtype=torch.int64, device=self.device)
            self._has_cache = not differs(self.read(ids[:, 9:].repeat(2, 1), prefix), 9)
        except (AttributeError, TypeError, ValueError):
            self._has_cache = False

    def room(self, tokens: int) -> AbstractContextManager[None]:
        """There is always room for its context."""
        return nullcontext()

    def read(self, ids: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Hidden states, or logits where the model has no head apart; behind a cache where it has one."""
        if prefix is not None and not self._has_cache:
            shared, rows = prefix
            return self.read(torch.cat((shared[rows], ids), dim=1))[:, shared.size(1) :]
        if self.base is None:
            logits: Tensor = self.model(input_ids=ids).logits
            return logits
        options: dict[str, Any] = {"use_cache": prefix is not None}
        if prefix is not None:
            shared, rows = prefix
            cache = self.base(input_ids=shared, use_cache=True).past_key_values
            cache.batch_select_indices(rows)
            positions = torch.arange(shared.size(1), shared.size(1) + ids.size(1), device=ids.device)
            options |= {"past_key_values": cache, "position_ids": positions.expand(len(rows), -1)}
        hidden: Tensor = self.base(input_ids=ids, **options).last_hidden_state
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """Losses in nats, and whether the target is the likeliest token."""
        step = max(1, CHUNK_ELEMENTS // int(self.model.config.vocab_size))
        nats, hits = [], []
        for part, wanted in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
            logits = (part if self.base is None else self.head(part)).float()
            nats.append(F.cross_entropy(logits, wanted, reduction="none"))
            hits.append(logits.argmax(-1) == wanted)
        return torch.cat(nats), torch.cat(hits)

    def flops(self, tokens: int, outputs: int) -> float:
        """Two operations a weight of a matrix, of all layers for every token; tables are looked up."""
        layers = [m for m in self.model.modules() if not isinstance(m, torch.nn.Embedding)]
        matrices = (p for m in layers for p in m.parameters(recurse=False) if p.dim() > 1)
        weights = sum(matrix.numel() for matrix in matrices)
        head: int = 0 if self.base is None else self.head.weight.numel()
        return 2.0 * float(tokens * (weights - head) + outputs * head)


class HFEncoder:
    """A tokenizer of transformers as a prompt_tokens.Encoder; texts are tokenized whole."""

    pattern = ""

    def __init__(self, tokenizer: Any) -> None:
        """Take a fast tokenizer that has BOS or EOS."""
        self._tokenizer = tokenizer
        # Where it has no BOS, its EOS, as karpathy/nanochat does with GPT-2.
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos_id: int = eos if bos is None else bos

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of all texts end to end, and offsets."""
        rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        offsets = np.cumsum([0, *map(len, rows)])
        return np.array([token for ids in rows for token in ids], dtype=np.int64), offsets


def load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[HFScorer, HFEncoder]:
    """A model by its path or its name on the hub. Code that comes with a model is never run.

    Raises:
        UserError: transformers is missing, there is no such model, or it needs code of its own.
    """
    try:
        import transformers
    except ImportError:
        raise UserError('--hf needs transformers: pip install "nanochat[eval]".') from None
    # Without it, transformers would prompt on the console whether to run the model's own code.
    no_code: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **no_code)
        causal: Any = transformers.AutoModelForCausalLM  # whose types change with the release
        model = causal.from_pretrained(name, dtype=dtype, use_safetensors=True, **no_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--hf {name}: cannot be loaded ({reason}). Give the folder or the hub's name of a causal "
            "language model in safetensors that needs no code of its own; a run of ours is scored with --run."
        ) from error
    if not tokenizer.is_fast or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise UserError(
            f"--hf {name}: its tokenizer is a slow one, or has neither BOS nor EOS. Use another model."
        )
    return HFScorer(model.to(device)), HFEncoder(tokenizer)
