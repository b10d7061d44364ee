"""Decode step on a CPU: one new position of each row, by compiled code in the place of torch's operators.

A small model decodes at the speed at which its weights are read, and of a step through torch most is dispatch
and sleeping threads. The code is the extension's (rustbpe/src/decode). Its sums and activations are fp32,
those between layers too, and weights have the compute dtype, or int8; a row's result does not depend on the
rows beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import rustbpe
from nanochat.common.errors import UserError

if TYPE_CHECKING:
    from nanochat.model.gpt import GPT
    from nanochat.model.kv_cache import KVCache

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class DecodeStep:
    """One new position of each of some rows, for the weights that a model had when this was made."""

    def __init__(self, model: GPT) -> None:
        """Pack the weights of a model that `is_supported`."""
        c, dtype = model.config, model.dtype

        def numbers(weight: Tensor) -> Tensor:
            return weight.detach().to(dtype).float()

        layers = []
        blocks: Any = model.blocks  # whose parts torch's types do not know
        for i, block in enumerate(blocks):
            attn, mlp = block.attn, block.mlp
            qkv = torch.cat([numbers(matrix.weight) for matrix in (attn.q, attn.k, attn.v)])
            matrices = [qkv, *(numbers(matrix.weight) for matrix in (attn.out, mlp.up, mlp.down))]
            gate = table = None
            if attn.value_gate is not None:
                gate = numbers(attn.value_gate.weight).numpy()
                table = _numbers(model.get_parameter(f"value_embeds.{i}.weight").detach())
            layers.append((*(matrix.numpy() for matrix in matrices), gate, table))
        self.vocabulary, self._windows = c.vocab_size, model.windows
        self._step = rustbpe.DecodeStep(
            precision=_NAMES[dtype] if model.decode_weights == "auto" else model.decode_weights,
            rounds=dtype == torch.bfloat16,
            layers=layers,
            windows=list(model.windows),
            mix=torch.stack([model.resid_scale, model.x0_scale], dim=1).tolist(),
            head=numbers(model.head.weight).numpy(),
            vocabulary=c.vocab_size,
            embeddings=_numbers(model.embed.weight.detach()),
            heads=c.n_head,
            kv_heads=c.n_kv_head,
            cos=model.cos[:, 0].float().numpy(),
            sin=model.sin[:, 0].float().numpy(),
            smear_gate=numbers(model.smear_gate.weight)[0].numpy(),
            smear_scale=model.smear_scale.item(),
            backout_scale=model.backout_scale.item(),
            gate_scale=c.value_gate_scale,
            scale=blocks[0].attn.scale,
            softcap=c.softcap,
        )

    def logits(
        self, tokens: Sequence[int], rows: Sequence[int], lengths: Sequence[int], cache: KVCache
    ) -> Tensor:
        """Store one position more in some rows of a cache: (len(rows), V) fp32 logits of what comes next.

        Args:
            tokens: a new id for each of the rows.
            rows: of the cache, each once.
            lengths: positions that each of them stores.
            cache: of the model. Its `length` stays as it is.
        """
        ids, at = cache.ids.numpy(), (list(rows), list(lengths))
        before = ids[at].tolist()
        ids[at[0], [length + 1 for length in lengths]] = tokens
        logits = torch.empty(len(before), self.vocabulary)
        self._step.step(
            list(tokens),
            [None if id < 0 else id for id in before],
            *at,
            _numbers(cache.k.view(*cache.k.shape[:3], -1)),
            _numbers(cache.v.view(*cache.v.shape[:3], -1)),
            logits.numpy(),
            torch.get_num_threads(),
        )
        return logits


def _numbers(kept: Tensor) -> NDArray[Any]:
    """The memory of a tensor; bf16, which numpy does not have, as the bits."""
    return kept.numpy() if kept.dtype == torch.float32 else kept.view(torch.uint16).numpy()


def is_supported(model: GPT) -> bool:
    """Whether the compiled step has this model's mathematics, dtype and device."""
    c = model.config
    return (
        model.head.weight.device.type == "cpu"
        and model.dtype in _NAMES
        and not c.kind.module
        and not c.bigram
        and c.n_embd % 4 == 0
    )


_made: weakref.WeakKeyDictionary[GPT, tuple[object, DecodeStep]] = weakref.WeakKeyDictionary()


def use_weights(model: GPT, weights: str) -> None:
    """Let steps store the matrices of a model in "int8", or in the compute dtype ("auto").

    Raises:
        UserError: the model is not decoded by the compiled step.
    """
    if weights != "auto" and not is_supported(model):
        raise UserError(
            f"--weights={weights}: is for models of the plain shape in fp32 or bf16 on a CPU. Leave it out."
        )
    model.decode_weights = weights


def decode_step(model: GPT) -> DecodeStep | None:
    """The step of a model as it is, made again where its weights have changed; None where it has none."""
    if not is_supported(model):
        return None
    state = (
        model.decode_weights,
        model.windows,
        model.cos.size(0),
        [(id(p), p._version) for p in model.parameters()],
    )
    if model not in _made or _made[model][0] != state:
        _made[model] = state, DecodeStep(model)
    return _made[model][1]
