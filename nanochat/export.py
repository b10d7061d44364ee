"""Export: a trained model as a folder that `transformers` loads, with its modelling file.

Other programs, lm-evaluation-harness among them, run the model without nanochat.
"""

from __future__ import annotations

import dataclasses
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

MODELING = "modeling_nanochat"
BOS = "<|bos|>"


def run(args: ExportArgs) -> Path:
    """Write a checkpoint in another format; returns the folder.

    Raises:
        UserError: no such run, or the folder exists already.
    """
    if not args.run:
        raise UserError("--run is missing. Name the run to export, for example --run d12.")
    # Behind a link, the folder it leads to is written, and the link stays.
    folder = (Path(args.out).expanduser() if args.out else files.run_dir(args.run) / args.format).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already. Remove it, or name another folder with --out.")
    device, precision = torch.device("cpu"), Precision(torch.float32, "sdpa")
    model, tokenizer, meta = checkpoint_state.load_model(
        args.run, args.step, device=device, precision=precision
    )
    write_hf(model, tokenizer, folder)
    print(f"step {meta['step']} of run {args.run} written: {folder}")
    print("load it: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    return folder


def write_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, config, tokenizer and the modelling file; the folder appears whole or not at all."""
    end = tokenizer.bos_id  # a document ends where the next one begins
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "use_cache": True}
    with files.atomic_dir(folder) as temporary:
        checkpoint_format.save_tensors(temporary / "model.safetensors", _weights(model), {"format": "pt"})
        files.write_json(temporary / "config.json", _config(model.config) | ids)
        files.write_json(temporary / "generation_config.json", ids)
        _write_tokenizer(tokenizer, model.config, temporary)
        text = Path(__file__).with_name("hf_modeling.py.txt").read_text("utf-8")
        files.atomic_write(temporary / f"{MODELING}.py", text)


def _weights(model: GPT) -> dict[str, Tensor]:
    """Parameters by name, without the rows that pad the vocabulary."""
    size, tables = model.config.vocab_size, ("embed.", "head.", "value_embeds.")
    return {
        name: (p[:size] if name.startswith(tables) else p).detach().contiguous()
        for name, p in model.named_parameters()
    }


def _config(shape: GPTConfig) -> dict[str, Any]:
    """The fields of GPTConfig by their own names, and its properties that the modelling file reads."""
    return dataclasses.asdict(shape) | {
        "model_type": "nanochat_export",
        "architectures": ["NanochatForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.NanochatConfig",
            "AutoModelForCausalLM": f"{MODELING}.NanochatForCausalLM",
        },
        "dtype": "float32",
        "tie_word_embeddings": False,
        "windows": list(shape.windows),
        "value_layers": [layer for layer in range(shape.n_layer) if shape.has_value_embedding(layer)],
        "value_gate_channels": shape.value_gate_width,
        "smear_gate_channels": shape.smear_gate_width,
        "n_map": shape.n_head * shape.kind.maps,
        "qk_dim": shape.qk_dim,
        "bigram_rows": shape.bigram_rows,
    }


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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": BOS,
        "padding_side": "left",  # what transformers expects of a model that generates
        "split_special_tokens": True,  # a text that spells <|bos|> is text, as in training
        "model_max_length": shape.sequence_len,
        "clean_up_tokenization_spaces": False,
    }
    files.write_json(folder / "tokenizer_config.json", config)
