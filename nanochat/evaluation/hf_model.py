"""A causal language model of Hugging Face, scored by the same code as our own. Needs the extra `eval`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanochat.common.errors import UserError

DEFAULT_CONTEXT = 2048  # where a model's config names none
# Logits held at a time: 2^27 are half a GB in fp32.
CHUNK_ELEMENTS = 1 << 27
# Of the largest logit: two ways to compute the same in bf16 differ by less, a scale or a cap by more.
PROBE_TOLERANCE = 0.02


class HFScorer:
    """A model of transformers as a core_scoring.Scorer; its `read` gives what its head takes."""

    def __init__(self, model: Any) -> None:
        """Take a model, and try what it allows: the head by itself, and going on behind its cache."""
        self.model = model.eval()
        self.head = model.get_output_embeddings()
        self.base = None if self.head is None or model.base_model is model else model.base_model
        self._shares = False
        self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """Some models scale or cap their logits, or have no cache of keys: then they are read as a whole."""
        ids = torch.arange(1, 17, device=self.device)[None] % int(self.model.config.vocab_size)
        logits = self.model(input_ids=ids).logits.float()
        tolerance = float(logits.abs().max()) * PROBE_TOLERANCE
        if self.base is not None:
            apart = self.head(self.read(ids, 0)).float()
            if apart.shape != logits.shape or float((apart - logits).abs().max()) > tolerance:
                self.base = None
        if self.base is None:
            return
        rows = torch.zeros(2, dtype=torch.int64, device=self.device)
        try:
            self._shares = True
            behind = self.head(self.read_on(ids[:, :9], rows, ids[:, 9:].repeat(2, 1), 0)).float()
            self._shares = float((behind - logits[:, 9:]).abs().max()) <= tolerance
        except (AttributeError, TypeError, ValueError):
            self._shares = False

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.model.device
        return device

    @property
    def context_tokens(self) -> int:
        """Length its config names."""
        config = self.model.config
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        return DEFAULT_CONTEXT

    @property
    def longest_tokens(self) -> int:
        """Its context: a model with a table of positions cannot read beyond it."""
        return self.context_tokens

    def room(self, tokens: int) -> AbstractContextManager[None]:
        """There is always room for its context."""
        return nullcontext()

    def read(self, ids: Tensor, first: int) -> Tensor:
        """(B, T) -> hidden states (B, T - first, C), or logits where the model has no head apart."""
        if self.base is None:
            logits: Tensor = self.model(input_ids=ids).logits
            return logits[:, first:]
        hidden: Tensor = self.base(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[:, first:]

    def read_on(self, shared: Tensor, rows: Tensor, ids: Tensor, first: int) -> Tensor:
        """Outputs of ids that follow shared[rows]; behind a cache where the model has one."""
        if not self._shares or self.base is None:
            return self.read(torch.cat((shared[rows], ids), dim=1), shared.size(1) + first)
        cache = self.base(input_ids=shared, use_cache=True).past_key_values
        cache.batch_select_indices(rows)
        place = torch.arange(shared.size(1), shared.size(1) + ids.size(1), device=ids.device)
        hidden: Tensor = self.base(
            input_ids=ids, past_key_values=cache, position_ids=place.expand(len(rows), -1), use_cache=True
        ).last_hidden_state
        return hidden[:, first:]

    def losses(self, hidden: Tensor, targets: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
        """Losses in nats, and whether the target is the likeliest token."""
        step = max(1, CHUNK_ELEMENTS // int(self.model.config.vocab_size))
        nats, hits = [], []
        for part, wanted in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
            logits = (part if self.base is None else self.head(part)).float()
            nats.append(F.cross_entropy(logits, wanted, reduction="none"))
            hits.append(logits.argmax(-1) == wanted)
        return torch.cat(nats), torch.cat(hits)

    def flops(self, tokens: int, finished: int, outputs: int) -> float:
        """Two operations a weight of a matrix, of all layers for every token; tables are looked up."""
        tables = torch.nn.Embedding
        own = [m.parameters(recurse=False) for m in self.model.modules() if not isinstance(m, tables)]
        weights = int(sum(parameter.numel() for part in own for parameter in part if parameter.dim() > 1))
        head = 0 if self.base is None else int(self.head.weight.numel())
        return 2.0 * (tokens * (weights - head) + outputs * head)


class HFEncoder:
    """A tokenizer of transformers as a core_tokens.Encoder; texts are tokenized whole."""

    pattern = ""

    def __init__(self, tokenizer: Any) -> None:
        """Take a fast tokenizer."""
        self._tokenizer = tokenizer
        self.fingerprint = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    @property
    def bos_id(self) -> int:
        """Its BOS; where it has none, its EOS, as karpathy/nanochat does with GPT-2."""
        own = self._tokenizer
        return int(own.bos_token_id if own.bos_token_id is not None else own.eos_token_id)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text, after BOS if asked."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of all texts end to end, and offsets."""
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        offsets = np.cumsum([0, *map(len, found)])
        return np.array([token for ids in found for token in ids], dtype=np.int64), offsets


def load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[HFScorer, HFEncoder]:
    """A model by its path or its name on the hub. Code that comes with a model is never run.

    Raises:
        UserError: transformers is missing, there is no such model, or it needs code of its own.
    """
    try:
        import transformers
    except ImportError:
        raise UserError('--hf needs transformers: pip install "nanochat[eval]".') from None
    try:
        # Not asked for in words, transformers would ask on the console whether to run the model's own code.
        no_code = {"trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **no_code)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, **no_code
        )
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
    placed: Any = model  # whose own types change with the release
    return HFScorer(placed.to(device)), HFEncoder(tokenizer)
