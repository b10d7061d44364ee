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
from nanochat.tokenizer.tokenizer import FILE_NAME, SPECIALS, Tokenizer

MODELING = "modeling_nanochat"
BOS, REPLY_END = "<|bos|>", "<|assistant_end|>"


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
    # A run of the chat stage says in its plan what it was finetuned from.
    write_hf(model, tokenizer, folder, chat=meta["plan"].get("finetune") is not None)
    print(f"step {meta['step']} of run {args.run} written: {folder}")
    print("load it: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    return folder


def write_hf(model: GPT, tokenizer: Tokenizer, folder: Path, *, chat: bool = False) -> None:
    """Write weights, config, tokenizer and the modelling file; the folder appears whole or not at all.

    Args:
        model: the weights, in any dtype.
        tokenizer: of the model.
        folder: to write; absent or empty.
        chat: the model was finetuned on conversations. The folder then has the chat template, special tokens
            are found in all text, and a reply ends with `<|assistant_end|>`. Without, they are text, so a
            template would only give wrong ids, and there is none.
    """
    bos = tokenizer.bos_id  # a document ends where the next one begins
    end = tokenizer.special_id(REPLY_END) if chat else bos
    # Padding is the end as well: of another token in a prompt, `generate` believes that it is padding.
    ids = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": end, "use_cache": True}
    with files.atomic_dir(folder) as temporary:
        checkpoint_format.save_tensors(temporary / "model.safetensors", _weights(model), {"format": "pt"})
        files.write_json(temporary / "config.json", _config(model.config) | ids)
        generation: dict[str, Any] = dict(ids)
        if chat:  # as our replies without a tool: no program would answer the code of the model
            generation["suppress_tokens"] = [
                tokenizer.special_id(name) for name in SPECIALS if name != REPLY_END
            ]
        files.write_json(temporary / "generation_config.json", generation)
        _write_tokenizer(tokenizer, model.config, temporary, chat)
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


def _write_tokenizer(tokenizer: Tokenizer, shape: GPTConfig, folder: Path, chat: bool) -> None:
    """tokenizer.json with a BOS put before every text, as in training; for chat, with the special tokens."""
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
    end = REPLY_END if chat else BOS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # what transformers expects of a model that generates
        "split_special_tokens": not chat,  # without turns, a text that spells <|bos|> is text, as in training
        "model_max_length": shape.sequence_len,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        document["added_tokens"] = [
            {"id": tokenizer.special_id(name), "content": name, **flags} for name in SPECIALS
        ]
        config["chat_template"] = Path(__file__).with_name("chat_template.jinja").read_text("utf-8")
    files.write_json(folder / FILE_NAME, document)
    files.write_json(folder / "tokenizer_config.json", config)
