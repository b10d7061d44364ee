"""An experiment as a person writes it: variants by name, each a few flags of base_train or a git revision.

question = "Which learning rate of Muon is best after a million tokens?"
seeds = [0, 1, 2]
target_bpb = 2.2              # optional; by default what the first variant reached with every seed
[flags]                       # of every run
corpus = "prose"
depth = 3
num-iterations = 250
[variants.lr02]               # the first one is what the others are compared with
matrix-lr = 0.02
[variants.lr03]
matrix-lr = 0.03
[variants.idea]               # the same flags, by the code of a branch
revision = "my-branch"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import files
from nanochat.common.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Flags = dict[str, "str | int | float | bool"]

FIELDS = {
    "question": str,
    "seeds": list,
    "flags": dict,
    "variants": dict,
    "target_bpb": float,
    "ranks": int,
    "keep_checkpoints": bool,
}
OURS = ("run", "seed", "resume", "dry-run")  # flags that the experiment gives
COMMON = ("corpus", "depth")  # flags in which variants may not differ


@dataclass(frozen=True)
class Variant:
    """One of the things compared.

    Attributes:
        name: as it stands in the table.
        flags: of base_train, those of all variants included.
        revision: the code it runs by, as git names it; None for the code as it lies here.
    """

    name: str
    flags: Flags
    revision: str | None


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed."""

    name: str
    variant: Variant
    seed: int

    def arguments(self) -> list[str]:
        """What base_train is given; a run that has begun goes on where it was."""
        flags: Flags = {**self.variant.flags, "run": self.name, "seed": self.seed, "resume": "auto"}
        return [_argument(name, value) for name, value in flags.items()]


@dataclass(frozen=True)
class Experiment:
    """What is asked, and all that decides its runs.

    Attributes:
        name: of the file and the depth; begins the names of its runs.
        question: in a sentence.
        seeds: of each variant.
        variants: what is compared; the first is the baseline.
        target_bpb: steps and seconds are counted to this validation bpb; None: see `experiment_results`.
        ranks: processes of each run, started by torchrun where there are several.
        keep_checkpoints: whether a run that has ended keeps them.
    """

    name: str
    question: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    target_bpb: float | None
    ranks: int
    keep_checkpoints: bool

    def run(self, variant: Variant, seed: int) -> Run:
        """The run of a variant with a seed."""
        return Run(f"{self.name}-{variant.name}-s{seed}", variant, seed)

    def order(self) -> list[Run]:
        """All runs, seed by seed, each seed beginning with another variant.

        What drifts while an experiment goes on, a warmer or busier machine, then meets all variants alike.
        """
        runs = []
        for turn, seed in enumerate(self.seeds):
            first = turn % len(self.variants)
            rotated = self.variants[first:] + self.variants[:first]
            runs += [self.run(variant, seed) for variant in rotated]
        return runs


def _argument(name: str, value: str | int | float | bool) -> str:
    """A flag as argparse takes it.

    >>> _argument("compile", "off"), _argument("keep-tails", True), _argument("fp8", False)
    ('--compile=off', '--keep-tails', '--no-fp8')
    """
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def folder_of(name: str) -> Path:
    """The folder of an experiment: consoles of its runs, their locks, checkouts of other revisions."""
    return files.named("experiments", name)


def read(path: Path, depth: int | None = None) -> Experiment:
    """Read and check an experiment.

    Args:
        path: the file; its stem names the experiment.
        depth: in place of the file's.

    Raises:
        UserError: not TOML, a field that is missing, unknown or of another type, a flag that may not vary.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file ({error}).") from None
    _check_fields(path, found)
    flags = _flags(path, "flags", found["flags"])
    if depth is not None:
        flags["depth"] = depth
    if missing := [name for name in COMMON if name not in flags]:
        raise UserError(f"{path}: [flags] lacks {' and '.join(missing)}. All variants share them.")
    variants = tuple(_variant(path, name, given, flags) for name, given in found["variants"].items())
    return Experiment(
        name=f"{path.stem}-d{flags['depth']}",
        question=found["question"],
        seeds=tuple(found["seeds"]),
        variants=variants,
        target_bpb=found.get("target_bpb"),
        ranks=found.get("ranks", 1),
        keep_checkpoints=found.get("keep_checkpoints", True),
    )


def _check_fields(path: Path, found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name not in FIELDS:
            raise UserError(f"{path}: unknown field {name!r}. Known are {', '.join(FIELDS)}.")
        if type(value) is not FIELDS[name]:
            raise UserError(f"{path}: {name} is {value!r}, expected {FIELDS[name].__name__}.")
    for name in ("question", "seeds", "flags", "variants"):
        if not found.get(name):
            raise UserError(f"{path}: {name} is missing or empty.")
    seeds = found["seeds"]
    if any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds is {seeds!r}, expected different numbers from 0 on.")
    if found.get("ranks", 1) < 1:
        raise UserError(f"{path}: ranks is {found['ranks']}, expected 1 or more.")


def _flags(path: Path, table: str, given: Any) -> Flags:
    if not isinstance(given, dict):
        raise UserError(f"{path}: {table} is {given!r}, expected a table of flags.")
    for name, value in given.items():
        if name in OURS:
            raise UserError(f"{path}: [{table}] has {name}, which the experiment gives itself.")
        if not isinstance(value, str | int | float | bool):
            raise UserError(f"{path}: [{table}] {name} is {value!r}, expected text, a number, true or false.")
    return {name.replace("_", "-"): value for name, value in given.items()}


def _variant(path: Path, name: str, given: Any, common: Flags) -> Variant:
    own = _flags(path, f"variants.{name}", given)
    folder_of(name)  # refuses what cannot be a part of a folder's name
    revision = own.pop("revision", None)
    if revision is not None and not isinstance(revision, str):
        raise UserError(
            f"{path}: [variants.{name}] revision is {revision!r}, expected text, as git names it."
        )
    if varied := [flag for flag in COMMON if flag in own]:
        raise UserError(f"{path}: [variants.{name}] sets {varied[0]}; variants are compared on the same one.")
    return Variant(name, {**common, **own}, revision)
