"""What a person may ask: one frozen dataclass a command; its fields are flags, their metadata the help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from nanochat import flags, typed_json
from nanochat.errors import UserError

Args = TypeVar("Args")

MESSAGE_LETTERS = 300  # of what the parser says: a wrong value may be long
ATTENTION_KINDS = ("softmax", "diff1", "diff2")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field with a default, a line of help, and what else is known of it in `metadata`.

    A number has a lower bound, `above` or `at_least`, and may have an upper one, `at_most`. `choices` are
    all that is taken; so is what `pattern` matches, which `expected` says in words. `names` says in which
    part of the base directory a text names something, `path` that it is a path and may have any bytes.
    `short` is a one-letter form, `positional` a value without a flag.

    A resumed run has to be given the value that the run began with, unless the flag is `planned` or `free`.
    """
    return field(default=default, metadata={"help": help, **metadata})


def planned(default: Any, help: str, **metadata: Any) -> Any:
    """A flag that acts through the plan alone: a resume compares what the plan made of it."""
    return flag(default, help, resume="planned", **metadata)


def free(default: Any, help: str, **metadata: Any) -> Any:
    """A flag that a resumed run may change: it decides neither the weights nor the data."""
    return flag(default, help, resume="free", **metadata)


@dataclass(frozen=True)
class TrainArgs:
    """Train a model. Everything that is not given follows from --depth."""

    depth: int = planned(
        12, "number of layers; decides width, heads, batch, learning rates, horizon, weight decay"
    )
    run: str = free("", "name of the run and of its folder; by default d<depth>")
    # Data
    corpus: str = flag(
        "fineweb-edu", "what to train on: stdlib, fineweb-edu, climbmix, fineweb10B-gpt2, your own"
    )
    tokenizer: str = free("", "name of the tokenizer; by default the corpus's name")
    keep_tails: bool = flag(False, "keep what is cropped from long documents as documents of their own")
    # Model
    max_seq_len: int = planned(2048, "context length T in tokens")
    window_pattern: str = planned(
        "SSSL", "attention window of each layer, tiled: S is a quarter of T, L is T"
    )
    aspect_ratio: int = planned(64, "width = depth * aspect ratio, raised to a whole number of heads")
    head_dim: int = planned(128, "width of an attention head")
    attention_kind: str = planned(
        "softmax",
        "what a head makes of its scores: softmax, or the difference of two (nanochat/differential.py)",
        choices=ATTENTION_KINDS,
    )
    bigram: bool = planned(
        False, "add an embedding of every pair of neighbouring tokens, hashed, in all layers"
    )
    document_mask: bool = planned(False, "keep attention within a document, also where the recipe would not")
    # Horizon: the first that is given counts
    num_iterations: int | None = planned(None, "number of optimizer steps")
    target_flops: float | None = planned(None, "train for this many floating-point operations")
    target_param_data_ratio: float | None = planned(
        None, "tokens per scaling parameter; by default the recipe's"
    )
    target_loss: float | None = free(
        None, "end the run at the first validation at or below this loss, in nats per token"
    )
    # Optimization
    recipe: str = planned(
        "july", "set of constants (nanochat/recipe.py)", choices=("july", "january", "speedrun-124m")
    )
    total_batch_size: int | None = planned(None, "tokens in a global batch; by default from the horizon")
    device_batch_size: int | None = free(None, "rows in a micro-batch of one rank; by default from depth")
    matrix_optimizer: str = planned(
        "muon", "optimizer of the block matrices", choices=("muon", "soap", "adamw")
    )
    matrix_lr: float | None = planned(
        None, "base learning rate of the block matrices, whatever optimizes them"
    )
    soap_every: int = flag(10, "steps between two renewals of SOAP's eigenbases")
    soap_sides: int = flag(
        2, "sides of a matrix that have an eigenbasis in SOAP: 2, or 1 for the shorter one", choices=(1, 2)
    )
    embedding_lr: float | None = planned(
        None, "base learning rate of the token embedding (AdamW); the value embeddings keep their ratio to it"
    )
    unembedding_lr: float | None = planned(None, "base learning rate of the output head (AdamW)")
    scalar_lr: float | None = planned(
        None, "base learning rate of x0_scale (AdamW); resid_scale keeps its ratio to it"
    )
    weight_decay: float | None = planned(None, "base weight decay of the block matrices, before scaling")
    z_loss: float = flag(0.0, "weight of the z-loss, which keeps the logits of training small")
    warmup_steps: int | None = planned(
        None, "steps of linear learning-rate warmup; by default the recipe's, in a tenth of the run at most"
    )
    warmdown_ratio: float | None = planned(None, "last share of the run in which the learning rate falls")
    final_lr_frac: float | None = planned(None, "share of the learning rate left at the end")
    seed: int = flag(0, "seed of the initial weights, the order of the data and the samples")
    on_nonfinite: str = free(
        "stop", "a step whose loss or gradient is not finite: stop, or skip it", choices=("stop", "skip")
    )
    # Machine
    device_type: str = free("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = flag("auto", "dtype of activations", choices=("auto", "bfloat16", "float16", "float32"))
    fp8: bool = flag(False, "products of wide linear layers in fp8 while training (Hopper and later)")
    attention: str = free("auto", "attention backend", choices=("auto", "fa3", "fa2", "flex", "sdpa"))
    compile: str = free(
        "auto",
        "torch.compile of the model and the optimizer; auto is on for CUDA",
        choices=("auto", "on", "off"),
    )
    profile: bool = free(False, "write a torch.profiler trace of steps 4 to 6 to the run's trace.json")
    recompute: str = free(
        "none",
        "compute again in the backward pass, to save memory: the MLPs or whole blocks",
        choices=("none", "mlp", "block"),
    )
    dist_timeout: float = free(600.0, "seconds that a rank waits for another before it gives up")
    # Evaluation, samples, checkpoints: 0 means only at the end
    eval_every: int = free(250, "steps between validations")
    eval_tokens: int = free(10_485_760, "validation tokens of each evaluation")
    core_metric_every: int | None = free(
        None, "steps between CORE evaluations; by default none while training"
    )
    core_metric_max_per_task: int = free(500, "examples of each CORE task while training")
    eval_bundle: str = free("", "CORE tasks: a folder, a zip, or mini; by default the base directory's")
    sample_every: int = free(2000, "steps between samples")
    save_every: int = free(1000, "steps between checkpoints")
    save_minutes: float = free(0.0, "save also when the last save is so many minutes ago; 0 means never")
    keep_last: int = free(2, "checkpoints to keep")
    keep_every: int = free(0, "also keep the checkpoints of steps that this divides; 0 means none")
    resume: str = free("", "go on from a checkpoint: auto (the newest valid one, if any) or a step")
    extend: bool = free(False, "let a resumed run have another horizon than before")
    check_ranks_every: int = free(0, "steps between comparisons of the weights over the ranks; 0 means never")
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
    keep_last: int = flag(2, "how many of the newest prune keeps", at_least=1)
    keep_every: int = flag(0, "prune also keeps those of steps that this divides; 0 means none", at_least=0)


@dataclass(frozen=True)
class EvalArgs:
    """Score a trained model: CORE, bits per byte, samples."""

    run: str = flag("", "name of the run", names="runs")
    step: int | None = flag(None, "checkpoint to score; by default the newest", at_least=0)
    eval: str = flag("core,bpb,sample", "what to do, separated by commas")
    hf: str = flag(
        "", "score this model of Hugging Face with CORE instead: a folder or a name on the hub", path=True
    )
    eval_bundle: str = flag(
        "", "CORE tasks: a folder, a zip, or mini for the small suite made on the spot", path=True
    )
    core_variant: str = flag(
        "nanochat",
        "prompts, shots and baselines of CORE (GPT-2's 0.256525 is nanochat's)",
        choices=("nanochat", "dclm"),
    )
    core_metric_max_per_task: int = flag(0, "examples of each task; 0 means all", at_least=0)
    core_crop_tokens: int | None = flag(
        None,
        "longer prompts of CORE lose their beginning; by default the model's context",
        at_least=2,
        at_most=2**24,
    )
    eval_batch_tokens: int = flag(
        16384, "most positions in a forward pass of CORE: bounds its memory", at_least=1
    )
    keep_going: bool = flag(False, "leave out tasks of CORE whose file is faulty; then there is no CORE")
    compare: tuple[str, ...] = flag(
        (), "two scored runs: test their difference, example by example", names="runs"
    )
    combine: tuple[str, ...] = flag(
        (), "scored runs that differ in their seed: mean and standard error", names="runs"
    )
    eval_tokens: int = flag(10_485_760, "tokens for bits per byte, of each split", at_least=1)
    device_batch_size: int = flag(16, "rows of a batch for bits per byte", at_least=1, at_most=2**24)
    max_new_tokens: int = flag(64, "tokens of each sample", at_least=1, at_most=2**24)
    device_type: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = flag("auto", "dtype of activations", choices=("auto", "bfloat16", "float16", "float32"))
    attention: str = flag("auto", "attention backend", choices=("auto", "fa3", "fa2", "flex", "sdpa"))
    dist_timeout: float = flag(
        1800.0, "seconds that a rank waits for another before it gives up", at_least=1, at_most=10**7
    )


@dataclass(frozen=True)
class TokTrainArgs:
    """Train a tokenizer on a corpus."""

    corpus: str = flag(
        "fineweb-edu", "what to train on: stdlib, fineweb-edu, climbmix or your own corpus", names="data"
    )
    name: str = flag("", "name of the tokenizer; by default the corpus's name", names="tokenizers")
    vocab_size: int = flag(
        32768, "entries of the vocabulary, special tokens included", at_least=1, at_most=2**31 - 1
    )
    max_chars: int = flag(2_000_000_000, "characters to train on", at_least=1)
    doc_cap: int = flag(10_000, "characters taken of each document", at_least=1)
    max_memory: int | None = flag(
        None,
        "bytes that training may take; above them rare pieces are dropped. By default no bound",
        at_least=1,
    )
    overwrite: bool = flag(False, "train again although the tokenizer exists")


@dataclass(frozen=True)
class TokEvalArgs:
    """Measure how well a tokenizer compresses, beside others."""

    tokenizer: str = flag("fineweb-edu", "name of the tokenizer", names="tokenizers")
    corpus: str = flag("", "also measure on the validation text of this corpus", names="data")
    samples: str = flag("", "folder of .txt files to measure on; by default the project's own", path=True)
    peers_dir: str = flag(
        "", "folder of r50k_base.tiktoken (GPT-2) and cl100k_base.tiktoken to compare with", path=True
    )


@dataclass(frozen=True)
class DatasetArgs:
    """Fetch or make a corpus."""

    corpus: str = flag(
        "fineweb-edu", "which corpus: stdlib, local, fineweb-edu, climbmix, fineweb10B-gpt2", names="data"
    )
    num_shards: int | None = flag(None, "training shards to have; by default all", short="-n", at_least=1)
    first: int | None = flag(None, "fetch only so many of them now; the manifest lists all of -n", at_least=0)
    files: tuple[str, ...] = flag((), "parquet, jsonl or txt files or folders (corpus local)", path=True)
    val_file: str = flag("", "the file among them that is for validation (corpus local)", path=True)
    name: str = flag("", "name of the corpus folder; by default the corpus's name", names="data")
    verify: bool = flag(False, "hash every shard again and list what is wrong")
    list: bool = flag(False, "list the corpora that are there")


@dataclass(frozen=True)
class CoreDownloadArgs:
    """Fetch the 22 tasks of CORE."""

    url: str = flag(
        "", "a mirror of the zip; by default karpathy/nanochat's. Every file is checked by its hash"
    )


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a prompt."""

    prompt: tuple[str, ...] = flag((), "text to continue; several prompts are done together", positional=True)
    run: str = flag("", "name of the run", names="runs")
    step: int | None = flag(None, "checkpoint to use; by default the newest", at_least=0)
    max_new_tokens: int = flag(256, "most tokens to add", at_least=1, at_most=2**24)
    temperature: float = flag(0.8, "0 takes the likeliest token", at_least=0)
    top_k: int = flag(50, "sample among this many likeliest tokens; 0 means all", at_least=0)
    num_samples: int = flag(1, "continuations of each prompt", at_least=1, at_most=2**24)
    seed: int = flag(0, "seed of the samples", at_least=0)
    device_type: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = flag("auto", "dtype of activations", choices=("auto", "bfloat16", "float16", "float32"))
    attention: str = flag("auto", "attention backend", choices=("auto", "fa3", "fa2", "flex", "sdpa"))


@dataclass(frozen=True)
class ExportArgs:
    """Write a trained model for other programs."""

    run: str = flag("", "name of the run", names="runs")
    step: int | None = flag(None, "checkpoint to write; by default the newest", at_least=0)
    format: str = flag("hf", "hf: a folder that transformers loads", choices=("hf",))
    out: str = flag("", "folder to make; by default <run>/<format>", path=True)


@dataclass(frozen=True)
class ReportArgs:
    """Make report.html from the files of a run."""

    run: str = flag("", "name of the run", names="runs")


def require_possible(args: TrainArgs) -> None:
    """Refuse arguments that no run can have.

    Raises:
        UserError: names the first of them.
    """
    _require_sizes(args)
    _require_techniques(args)


def _require_sizes(args: TrainArgs) -> None:
    sizes = ("depth", "max_seq_len", "aspect_ratio", "head_dim", "total_batch_size", "device_batch_size")
    ends = ("num_iterations", "target_param_data_ratio", "target_flops", "target_loss")
    for name in (*sizes, *ends, "keep_last", "soap_every"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected a number above 0.")
    if args.head_dim % 2:
        raise UserError(
            f"--head-dim={args.head_dim}: expected an even number: rotary embeddings pair halves."
        )
    if args.attention_kind not in ATTENTION_KINDS:
        raise UserError(
            f"--attention-kind={args.attention_kind}: expected one of {', '.join(ATTENTION_KINDS)}."
        )
    if args.attention_kind == "diff1" and args.head_dim % 4:
        raise UserError(
            f"--head-dim={args.head_dim}: --attention-kind=diff1 halves a head, and rotary embeddings each "
            "half: expected a multiple of 4."
        )
    if not args.window_pattern or set(args.window_pattern) - {"S", "L"}:
        raise UserError(f"--window-pattern={args.window_pattern!r}: expected letters S and L, such as SSSL.")
    if args.warmdown_ratio is not None and not 0 <= args.warmdown_ratio <= 1:
        raise UserError(f"--warmdown-ratio={args.warmdown_ratio}: expected a share between 0 and 1.")
    cadences = ("eval_every", "sample_every", "save_every", "save_minutes", "keep_every", "check_ranks_every")
    for name in (*cadences, "core_metric_every", "warmup_steps", "seed"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected 0 or more.")


def _require_techniques(args: TrainArgs) -> None:
    if not 0 <= args.z_loss < math.inf:
        raise UserError(f"--z-loss={args.z_loss}: expected 0 or more, such as 1e-4.")


def parse(cls: type[Args], argv: list[str] | None = None) -> Args:
    """Read a command line into an instance of a dataclass of this module.

    Args:
        cls: one of the dataclasses above.
        argv: the arguments; by default those of the process.

    Raises:
        SystemExit: with code 2 for an unknown flag or a value that does not parse, code 0 after --help.
        UserError: a value outside of the domain of its flag.
    """
    parser = _Parser(
        description=cls.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_flag(parser, item, hints[item.name])
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--"]:  # what separates torchrun's options from ours
        given = given[1:]
    values = parser.parse_mixed(given)
    args = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    flags.require_domain(args)
    return args


class _Parser(argparse.ArgumentParser):
    """A parser whose refusal is one line, like every other one."""

    def parse_mixed(self, given: list[str]) -> dict[str, Any]:
        """Values by name; prompts stand between flags, and behind -- whatever they begin with."""
        cut = given.index("--") if "--" in given else len(given)
        values, after = vars(self.parse_intermixed_args(given[:cut])), given[cut + 1 :]
        if after:
            taking = [action.dest for action in self._get_positional_actions() if action.nargs == "*"]
            if not taking:
                self.error(f"unrecognized arguments: {' '.join(after)}")
            values[taking[0]] = [*values[taking[0]], *after]
        return values

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave with code 2."""
        plain = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in message[:MESSAGE_LETTERS])
        advice = "Add --help to see the flags."
        if "prompt" in {action.dest for action in self._get_positional_actions()}:
            advice += " A prompt that begins with - comes last, after --."
        self.exit(2, f"error: {plain}. {advice}\n")


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
    """Turn one field into one flag: bool gives --x and --no-x, tuple takes many, X | None takes an X."""
    options: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
    if flags.is_number(hint) and "choices" not in item.metadata:
        options["help"] += f"; {flags.domain(item, hint)}"
    hint = flags.type_of(hint)
    if "choices" in item.metadata:
        options["choices"] = item.metadata["choices"]
    if typing.get_origin(hint) is tuple:
        options.update(nargs="*", type=str)
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = hint
    if item.metadata.get("positional"):
        parser.add_argument(item.name, **options)
        return
    names = [f"--{item.name.replace('_', '-')}"]
    if "short" in item.metadata:
        names.insert(0, item.metadata["short"])
    parser.add_argument(*names, dest=item.name, **options)


def from_dict(cls: type[Args], values: dict[str, Any]) -> Args:
    """An instance from what config.json holds.

    Raises:
        UserError: a field that this version does not know, or a value of another type.
    """
    known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"{cls.__name__}: unknown fields {unknown}. The file is of another version of nanochat."
        )
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if wrong := typed_json.mismatch(value, hints[name], name):
            raise UserError(f"{cls.__name__}: {wrong}. The file is damaged.")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
