"""A trained model as files for other programs: a folder that `transformers` loads as it is."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config.arguments import ExportArgs
from nanochat.config.model_config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer.tokenizer import FILE_NAME, Tokenizer

MODELING = "modeling_nanochat.py"
BOS = "<|bos|>"


def run(args: ExportArgs) -> Path:
    """Write a checkpoint in another format; returns the folder.

    Raises:
        UserError: no such run, the folder exists already, or the model cannot be written.
    """
    if not args.run:
        raise UserError("--run is missing. Name the run to export, for example --run d12.")
    folder = Path(args.out).expanduser() if args.out else files.run_dir(args.run) / args.format
    folder = folder.resolve()  # behind a link, what is there is replaced, not the link
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already. Remove it, or name another folder with --out.")
    precision = Precision(torch.float32, "sdpa")
    model, tokenizer, meta = checkpoint_state.load_model(
        args.run, args.step, device=torch.device("cpu"), precision=precision
    )
    write_hf(model, tokenizer, folder)
    print(f"step {meta['step']} of run {args.run} written: {folder}")
    print("load it: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    return folder


def write_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, config, tokenizer and the modelling file; the folder appears whole or not at all.

    Raises:
        UserError: the modelling file does not know the model's attention, or its table of pairs.
    """
    if model.config.bigram:
        raise UserError(
            f"{folder}: not written: the model has --bigram, which modeling_nanochat.py does not know. Use "
            "scripts.generate and scripts.base_eval with it."
        )
    if model.config.attention_kind != "softmax":
        raise UserError(
            f"{folder}: not written: the model has --attention-kind={model.config.attention_kind}, and "
            "modeling_nanochat.py knows softmax only. Use scripts.generate and scripts.base_eval with it."
        )
    with files.atomic_dir(folder) as temporary:
        checkpoint_format.save_tensors(temporary / "model.safetensors", _weights(model), {"format": "pt"})
        files.write_json(temporary / "config.json", _config(model.config, tokenizer))
        files.write_json(temporary / "generation_config.json", _generation(tokenizer))
        _write_tokenizer(tokenizer, model.config, temporary)
        text = importlib.resources.files("nanochat").joinpath("hf_modeling.py.txt").read_text("utf-8")
        files.atomic_write(temporary / MODELING, text)


def _weights(model: GPT) -> dict[str, Tensor]:
    """Parameters by name, without the rows that pad the vocabulary."""
    size, rows = model.config.vocab_size, model.config.padded_vocab_size
    tables = ("embed.", "head.", "value_embeds.")
    return {
        name: (
            p.detach()[:size] if name.startswith(tables) and p.size(0) == rows else p.detach()
        ).contiguous()
        for name, p in model.named_parameters()
    }


def _config(shape: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": "nanochat_export",
        "architectures": ["NanochatForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING[:-3]}.NanochatConfig",
            "AutoModelForCausalLM": f"{MODELING[:-3]}.NanochatForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.sequence_len,
        "windows": list(shape.windows),
        "value_layers": [layer for layer in range(shape.n_layer) if shape.has_value_embedding(layer)],
        "value_gate_channels": shape.value_gate_width,
        "value_gate_scale": shape.value_gate_scale,
        "smear_gate_channels": shape.smear_gate_width,
        "score_scale": shape.qk_scale**2 * shape.head_dim**-0.5,
        "softcap": shape.softcap,
        "rope_base": shape.rope_base,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.bos_id,
        "pad_token_id": tokenizer.bos_id,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """A document ends where the next one begins, at BOS."""
    end = tokenizer.bos_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "use_cache": False}


def _write_tokenizer(tokenizer: Tokenizer, shape: GPTConfig, folder: Path) -> None:
    """tokenizer.json with a BOS put before every text, as in training."""
    tokenizer.save(folder)
    document = json.loads((folder / FILE_NAME).read_text("utf-8"))
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
    }
    files.write_json(folder / FILE_NAME, document)
    files.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": BOS,
            "pad_token": BOS,
            "padding_side": "left",  # what transformers expects of a model that generates
            "split_special_tokens": True,  # a text that spells <|bos|> is text, as in training
            "model_max_length": shape.sequence_len,
            "clean_up_tokenization_spaces": False,
        },
    )
