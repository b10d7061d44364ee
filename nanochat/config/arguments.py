"""Command-line arguments: one frozen dataclass a command, whose fields are the flags and their help.

They are dataclasses so that a run's config.json and a checkpoint hold them as they were given.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.common.errors import UserError
from nanochat.common.flags import flag, free, planned, require_domain
from nanochat.common.flags import from_dict as from_dict  # read with config, in one breath
from nanochat.common.flags import parse as parse
from nanochat.config.model_config import ATTENTION_KINDS, ModelFlags
from nanochat.config.recipes import MATRIX_OPTIMIZERS, RECIPES, current_name


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """Flags of every command that computes with a model."""

    device_type: str = free("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = flag("auto", "dtype of activations", choices=("auto", "bfloat16", "float16", "float32"))
    attention: str = free(
        "auto", "attention backend", choices=("auto", "fa3", "fa2", "varlen", "flex", "sdpa")
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Flags of every command that loads a checkpoint."""

    run: str = flag("", "name of the run", names="runs")
    step: int | None = flag(None, "checkpoint to load; by default the newest", 0)


@dataclass(frozen=True)
class TrainArgs(ModelFlags, MachineFlags):
    """Train a model. Everything that is not given follows from --depth."""

    depth: int = planned(
        12, "number of layers; width, heads, batch, rates, horizon, weight decay follow", 1, 1000
    )
    run: str = free("", "name of the run and of its folder; by default d<depth>", names="runs")
    # Data
    corpus: str = flag(
        "fineweb-edu",
        "training text: stdlib, fineweb-edu, climbmix, fineweb10B-gpt2 or your own",
        names="data",
    )
    tokenizer: str = free("", "name of the tokenizer; by default the corpus's name", names="tokenizers")
    keep_tails: bool | None = flag(
        None, "train on remainders of cropped documents; by default if most would be lost"
    )
    # Model
    max_seq_len: int | None = planned(
        None, "context length T in tokens; by default 2048, less for a small text", 1, 2**24
    )
    aspect_ratio: int = planned(64, "width = depth * aspect ratio, rounded up to whole heads", 1, 2**16)
    head_dim: int = planned(128, "width of an attention head", 1, 2**16)
    document_mask: bool = planned(False, "attention within documents, also where the recipe has none")
    # Horizon: the first that is given counts; by default the recipe's ratio (a small text: at most 10 epochs)
    num_iterations: int | None = planned(None, "number of optimizer steps", 1)
    target_flops: float | None = planned(None, "total training FLOPs", above=0, at_most=1e30)
    target_param_data_ratio: float | None = planned(
        None, "tokens per scaling parameter", above=0, at_most=1e6
    )
    target_loss: float | None = free(
        None, "end at the first validation loss at or below this, nats/token", above=0, at_most=1000
    )
    # Optimization
    recipe: str = planned(
        "nanochat-2026-07", "set of constants (docs/recipe.md)", choices=tuple(RECIPES), reads=current_name
    )
    total_batch_size: int | None = planned(
        None, "tokens in a global batch; by default from the horizon", 1, 2**40
    )
    device_batch_size: int | None = free(
        None, "rows in a micro-batch of one rank; by default from depth and memory", 1, 2**24
    )
    matrix_optimizer: str = planned(
        "muon", "optimizer of the block matrices", choices=tuple(MATRIX_OPTIMIZERS)
    )
    matrix_lr: float | None = planned(None, "base learning rate of the block matrices", 0, 1000)
    soap_every: int = flag(10, "steps between two updates of SOAP's eigenbases", 1)
    soap_sides: int = flag(2, "SOAP: eigenbases on both sides, or on the shorter one", choices=(1, 2))
    embedding_lr: float | None = planned(
        None, "base learning rate of the token embedding; scales value embeddings too", 0, 1000
    )
    unembedding_lr: float | None = planned(None, "base learning rate of the output head (AdamW)", 0, 1000)
    scalar_lr: float | None = planned(None, "base learning rate of x0_scale; scales resid_scale too", 0, 1000)
    weight_decay: float | None = planned(None, "base weight decay of the block matrices", 0, 1000)
    warmup_steps: int | None = planned(
        None, "steps of linear warmup; by default the recipe's, at most a tenth", 0
    )
    warmdown_ratio: float | None = planned(
        None, "fraction of steps in the final linear learning-rate decay", 0, 1
    )
    final_lr_frac: float | None = planned(None, "fraction of the learning rate left at the end", 0, 1)
    seed: int = flag(0, "seed of the initial weights, the order of the data and the samples", 0)
    on_nonfinite: str = free("stop", "if loss or gradient is not finite", choices=("stop", "skip"))
    grad_reduce_dtype: str = flag(
        "float32", "dtype of gradients on their way to other ranks", choices=("float32", "bfloat16")
    )
    # Machine
    fp8: bool = flag(False, "fp8 matrix products in wide linear layers (Hopper and later)")
    fp8_head: bool = flag(False, "the output head's too, with --fp8")
    compile: str = free("auto", "torch.compile; auto is on for CUDA", choices=("auto", "on", "off"))
    profile: bool = free(False, "write a torch.profiler trace of steps 4 to 6 to the run's trace.json")
    recompute: str = free(
        "none", "activation checkpointing: of MLPs, or of whole blocks", choices=("none", "mlp", "block")
    )
    dist_timeout: float = free(600.0, "seconds until a collective times out", 1, 10**7)
    # Evaluation, samples, checkpoints: 0 means only at the end
    eval_every: int = free(250, "steps between validations", 0)
    eval_tokens: int = free(10_485_760, "validation tokens of each evaluation", 1)
    core_metric_every: int | None = free(None, "steps between CORE evaluations; by default none", 0)
    core_metric_max_per_task: int = free(500, "examples of each CORE task while training", 0)
    eval_bundle: str = free("", "CORE tasks: a folder, a zip, or mini", path=True)
    sample_every: int = free(2000, "steps between samples", 0)
    save_every: int = free(1000, "steps between checkpoints", 0)
    save_minutes: float = free(0.0, "minutes between checkpoints; 0 means by steps alone", 0, 10**7)
    keep_last: int = free(2, "checkpoints to keep", 1)
    keep_every: int = free(0, "also keep checkpoints of steps that this divides; 0 means none", 0)
    resume: str = free(
        "",
        "continue from a checkpoint: auto (the newest valid one, if any) or a step",
        pattern="auto|[0-9]{1,15}",
        expected="auto or the step of a checkpoint",
    )
    extend: bool = free(False, "let a resumed run have another horizon than before")
    check_ranks_every: int = free(0, "steps between comparisons of weights over ranks; 0 means never", 0)
    # Logging
    wandb: str = free("off", "also log to Weights & Biases", choices=("off", "online", "offline"))
    dry_run: bool = free(False, "print the plan and stop")

    @property
    def run_name(self) -> str:
        """The run's name, given or from depth."""
        return self.run or f"d{self.depth}"

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, given or the corpus's."""
        return self.tokenizer or self.corpus


@dataclass(frozen=True)
class CheckpointArgs:
    """List, verify or prune the checkpoints of a run."""

    do: str = flag("list", "what to do", choices=("list", "verify", "prune"), positional=True)
    run: str = flag("", "name of the run", positional=True, names="runs")
    keep_last: int = flag(2, "newest checkpoints that prune keeps", 1)
    keep_every: int = flag(0, "prune also keeps those of steps that this divides; 0 means none", 0)


@dataclass(frozen=True)
class EvalArgs(CheckpointFlags, MachineFlags):
    """Score a trained model: CORE, bits per byte, samples."""

    eval: str = flag("core,bpb,sample", "parts to score: core, bpb, sample")
    hf: str = flag("", "score a Hugging Face model with CORE instead: a folder or a name", path=True)
    eval_bundle: str = flag("", "CORE tasks: a folder, a zip, or mini", path=True)
    core_variant: str = flag(
        "nanochat",
        "CORE's prompts, shots and baselines (GPT-2's 0.256525 is nanochat's)",
        choices=("nanochat", "dclm"),
    )
    core_metric_max_per_task: int = flag(0, "examples of each task; 0 means all", 0)
    core_crop_tokens: int | None = flag(
        None, "keep the last tokens of longer CORE prompts; by default what the model reads", 2, 2**24
    )
    eval_batch_tokens: int = flag(32768, "positions in a forward pass of CORE at most", 1)
    keep_going: bool = flag(False, "skip tasks of CORE whose file is faulty; then there is no CORE metric")
    compare: tuple[str, ...] = flag(
        (), "two scored runs: test their difference example by example", names="runs"
    )
    combine: tuple[str, ...] = flag((), "scored runs of several seeds: mean and standard error", names="runs")
    eval_tokens: int = flag(10_485_760, "tokens for bits per byte, of each split", 1)
    device_batch_size: int = flag(16, "rows of a batch for bits per byte", 1, 2**24)
    max_new_tokens: int = flag(64, "tokens of each sample", 1, 2**24)
    dist_timeout: float = flag(1800.0, "seconds until a collective times out", 1, 10**7)


@dataclass(frozen=True)
class TokTrainArgs:
    """Train a tokenizer on a corpus."""

    corpus: str = flag("fineweb-edu", "corpus: stdlib, fineweb-edu, climbmix or your own", names="data")
    name: str = flag("", "name of the tokenizer; by default the corpus's name", names="tokenizers")
    vocab_size: int | None = flag(
        None, "vocabulary, specials included; by default 32768, less for a small text", 1, 2**31 - 1
    )
    max_chars: int = flag(2_000_000_000, "characters to train on", 1)
    doc_cap: int = flag(10_000, "characters of each document at most", 1)
    max_memory: int | None = flag(None, "bytes; above them rare chunks are dropped. By default no bound", 1)
    overwrite: bool = flag(False, "replace an existing tokenizer")


@dataclass(frozen=True)
class TokEvalArgs:
    """Measure how well a tokenizer compresses, beside others."""

    tokenizer: str = flag("fineweb-edu", "name of the tokenizer", names="tokenizers")
    corpus: str = flag("", "also measure on the validation text of this corpus", names="data")
    samples: str = flag("", "folder of .txt files to measure on; by default the project's own", path=True)
    peers_dir: str = flag(
        "", "folder of r50k_base.tiktoken and cl100k_base.tiktoken to compare with", path=True
    )


@dataclass(frozen=True)
class DatasetArgs:
    """Fetch or make a corpus."""

    corpus: str = flag("fineweb-edu", "stdlib, local, fineweb-edu, climbmix or fineweb10B-gpt2", names="data")
    num_shards: int | None = flag(None, "training shards to have; by default all", 0, short="-n")
    first: int | None = flag(None, "download only so many now; the manifest lists all of -n", 0)
    files: tuple[str, ...] = flag((), "text, JSON or parquet files, or folders (corpus local)", path=True)
    val_file: str = flag("", "the file among them that is for validation (corpus local)", path=True)
    name: str = flag("", "name of the corpus folder; by default the corpus's name", names="data")
    verify: bool = flag(False, "hash every shard again and list what is wrong")
    list: bool = flag(False, "list the corpora that are there")


@dataclass(frozen=True)
class CoreDownloadArgs:
    """Fetch the 22 tasks of CORE."""

    url: str = flag("", "mirror of the zip; every file is checked by its hash")


@dataclass(frozen=True)
class DecodeFlags(CheckpointFlags, MachineFlags):
    """Flags of the commands that add text to a prompt."""

    weights: str = flag(
        "auto", "what matrices are stored in to decode on a CPU; auto: --dtype", choices=("auto", "int8")
    )


@dataclass(frozen=True)
class GenerateArgs(DecodeFlags):
    """Continue a prompt."""

    prompt: tuple[str, ...] = flag((), "texts to continue, in one batch", positional=True)
    max_new_tokens: int = flag(256, "tokens to add at most", 1, 2**24)
    temperature: float = flag(0.8, "sampling temperature; 0 takes the likeliest token", 0)
    top_k: int = flag(50, "sample among this many likeliest tokens; 0 means all", 0)
    num_samples: int = flag(1, "continuations of each prompt", 1, 2**24)
    seed: int = flag(0, "seed of the samples", 0)


@dataclass(frozen=True)
class ExportArgs(CheckpointFlags):
    """Write a trained model for other programs."""

    format: str = flag("hf", "hf: a folder that transformers loads", choices=("hf",))
    out: str = flag("", "folder to write; by default <run>/<format>", path=True)


@dataclass(frozen=True)
class ReportArgs:
    """Make report.html from the files of a run."""

    run: str = flag("", "name of the run", names="runs")


@dataclass(frozen=True)
class ChatDataArgs:
    """Make or fetch a corpus of conversations."""

    corpus: str = flag(
        "made", "made, smoltalk, mmlu, gsm8k, arc-easy, arc-challenge, humaneval or local", names="data"
    )
    files: tuple[str, ...] = flag((), "jsonl files of conversations, or folders (corpus local)", path=True)
    val_file: str = flag("", "the file among them that is for validation (corpus local)", path=True)
    name: str = flag("", "name of the corpus folder; by default the corpus's name", names="data")
    conversations: int = flag(28_000, "training conversations (corpus made)", 1, 10**8)
    seed: int = flag(0, "seed of the conversations (corpus made)", 0)
    skip_bad: bool = flag(False, "leave out conversations that cannot be used, and say how many")
    list: bool = flag(False, "list the chat corpora that are there")


@dataclass(frozen=True, kw_only=True)
class FinetuneFlags(MachineFlags):
    """Flags of SFT and RL: the run to begin with, and what every training run has."""

    base: str = flag("", "name of the run to begin with", names="runs")
    base_step: int | None = flag(None, "checkpoint of it to begin with; by default the newest", 0)
    run: str = free("", "name of the new run; by default that of the base with -sft or -rl", names="runs")
    num_iterations: int | None = flag(None, "number of optimizer steps; by default one epoch", 1)
    device_batch_size: int | None = free(
        None, "rows in a micro-batch of one rank; by default from depth and memory", 1, 2**24
    )
    seed: int = flag(0, "seed of the order of the data and of the samples", 0)
    compile: str = free("auto", "torch.compile; auto is on for CUDA", choices=("auto", "on", "off"))
    recompute: str = free(
        "none", "activation checkpointing: of MLPs, or of whole blocks", choices=("none", "mlp", "block")
    )
    on_nonfinite: str = free("stop", "if loss or gradient is not finite", choices=("stop", "skip"))
    dist_timeout: float = free(600.0, "seconds until a collective times out", 1, 10**7)
    chat_eval_every: int | None = free(None, "steps between evaluations of the tasks; by default none", 0)
    chat_eval_tasks: str = free("made", "tasks of these evaluations: made, chatcore, or names with commas")
    chat_eval_max_per_task: int = free(100, "items of each task in these evaluations; 0 means all", 0)
    save_every: int = free(1000, "steps between checkpoints; 0 means only at the end", 0)
    keep_last: int = free(2, "checkpoints to keep", 1)
    resume: str = free(
        "",
        "continue from a checkpoint: auto (the newest valid one, if any) or a step",
        pattern="auto|[0-9]{1,15}",
        expected="auto or the step of a checkpoint",
    )
    wandb: str = free("off", "also log to Weights & Biases", choices=("off", "online", "offline"))
    dry_run: bool = free(False, "print the plan and stop")


@dataclass(frozen=True)
class SftArgs(FinetuneFlags):
    """Finetune a base model on conversations (SFT): the loss counts the replies alone."""

    data: tuple[str, ...] = flag(
        ("made",), "chat corpora, or a TOML file of a mixture (docs/chat.md)", path=True
    )
    total_batch_size: int | None = flag(
        None, "tokens in a global batch; by default that of the base", 1, 2**40
    )
    init_lr_frac: float = flag(0.8, "factor on the base run's learning rates", 0, 1000)
    warmdown_ratio: float = flag(0.5, "fraction of steps in the final linear learning-rate decay", 0, 1)
    document_mask: bool = flag(True, "attention within conversations, where a row holds several")
    eval_every: int = free(100, "steps between validations", 0)
    eval_tokens: int = free(131_072, "validation tokens of each evaluation, by source", 1)


@dataclass(frozen=True)
class RlArgs(FinetuneFlags):
    """Reinforce right replies (RL): on-policy policy gradient with verifiable rewards."""

    task: str = flag("bigsum", "what is asked; bigsum is made on the spot", choices=("bigsum", "gsm8k"))
    prompts: int = flag(16, "prompts of a step", 1, 2**20)
    samples: int = flag(8, "replies to each prompt", 2, 2**16)
    max_new_tokens: int = flag(256, "tokens of a reply at most", 1, 2**24)
    lr: float = flag(0.0005, "learning rate of all weights but scalars at the first step", 0, 1000)


@dataclass(frozen=True)
class ChatEvalArgs(CheckpointFlags, MachineFlags):
    """Score a chat model: ARC, MMLU, GSM8K, HumanEval, SpellingBee and the made tasks."""

    tasks: str = flag("made", "tasks: made, chatcore, or names with commas")
    max_per_task: int = flag(0, "items of each task; 0 means all (400 of a made task)", 0)
    num_samples: int = flag(1, "replies to each item, for pass@k", 1, 2**16)
    temperature: float = flag(0.0, "sampling temperature; 0 takes the likeliest token", 0)
    top_k: int = flag(0, "sample among this many likeliest tokens; 0 means all", 0)
    max_new_tokens: int = flag(256, "tokens of a reply at most", 1, 2**24)
    tools: bool = flag(True, "let replies use the calculator")
    seed: int = flag(0, "seed of the samples and of the made items", 0)
    compare: tuple[str, ...] = flag((), "two scored runs: test their difference item by item", names="runs")
    dist_timeout: float = flag(1800.0, "seconds until a collective times out", 1, 10**7)


@dataclass(frozen=True)
class ChatCliArgs(DecodeFlags):
    """Talk to a chat model in the terminal."""

    prompt: str = flag("", "one message: print its reply and leave", short="-p")
    system: str = flag("", "system text before the first message")
    temperature: float = flag(0.6, "sampling temperature; 0 takes the likeliest token", 0)
    top_k: int = flag(50, "sample among this many likeliest tokens; 0 means all", 0)
    max_new_tokens: int = flag(256, "tokens of a reply at most", 1, 2**24)
    tools: bool = flag(True, "let replies use the calculator")
    seed: int = flag(0, "seed of the samples", 0)


@dataclass(frozen=True)
class ChatWebArgs(DecodeFlags):
    """Serve a model: a page to talk to it, and OpenAI's endpoints."""

    host: str = flag("127.0.0.1", "address to listen at; any but this machine's own wants a key")
    port: int = flag(8000, "port to listen at; 0 takes a free one", 0, 65535)
    slots: int = flag(16, "replies decoded at once on each device", 1, 1024)
    max_queue: int = flag(64, "requests that may wait for a slot of a device", 1, 2**20)
    max_body: int = flag(2**20, "bytes of a request at most", 1, 2**30)
    max_messages: int = flag(200, "messages of a conversation at most", 1, 2**20)
    max_seconds: float = flag(300.0, "seconds of a reply at most", above=0)
    api_key_file: str = flag("", "file with the key that every request has to bring", path=True)
    key: bool = flag(True, "whether a --host that others can reach wants a key")
    allow_origin: tuple[str, ...] = flag((), "sites whose pages may use the server: https://example.org")
    allow_host: tuple[str, ...] = flag((), "names besides localhost under which the server is reached")
    log_conversations: str = flag("", "file that requests and answers are appended to", path=True)


def require_possible(args: TrainArgs) -> None:
    """Refuse arguments that no run can have.

    Raises:
        UserError: names the first of them.
    """
    require_domain(args)
    kind = ATTENTION_KINDS[args.attention_kind]
    if args.head_dim % (2 * kind.qk_divisor):
        raise UserError(
            f"--head-dim={args.head_dim}: expected a multiple of {2 * kind.qk_divisor}: queries are head_dim "
            f"/ {kind.qk_divisor} wide with --attention-kind={args.attention_kind}, and rotary embeddings "
            "pair their halves."
        )
    if args.fp8_head and not args.fp8:
        raise UserError("--fp8-head: goes with --fp8. Give both, or leave it out.")
    if not args.window_pattern or set(args.window_pattern) - {"S", "L"}:
        raise UserError(f"--window-pattern={args.window_pattern!r}: expected letters S and L, such as SSSL.")
