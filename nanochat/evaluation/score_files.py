"""Score files of a run: base_eval.json, and the answers behind CORE in core_predictions.jsonl.

A score may have taken hours. So each part is written as soon as it is known, beside what is there of the same
checkpoint; scores of another checkpoint are set aside under its step, and come back when it is scored again.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import files
from nanochat.common.errors import UserError

SCORES, ANSWERS = "base_eval.json", "core_predictions.jsonl"
OF_BPB = ("bpb", "loss", "bpb_profile")
OF_ALL = ("run", "step", "model", "weights", "dtype", "attention", "world_size", "seconds", "parts")
EMPTY: dict[str, Any] = {"core_metric": None, "core_stderr": None, "tasks": {}, "examples_per_second": None}
EMPTY |= {"bpb": {}, "loss": {}, "samples": []}


def digest_of(answers: bytes) -> str:
    """What base_eval.json says of the answers that its CORE is made of."""
    return hashlib.sha256(answers).hexdigest()


def _part_of(name: str) -> str:
    """Which part of a scoring a field of base_eval.json is of; most are of CORE."""
    parts = {"": OF_ALL, "bpb": OF_BPB, "sample": ("samples",)}
    return next((part for part, names in parts.items() if name in names), "core")


@dataclass
class ScoreFiles:
    """The scores of one checkpoint, as far as they are known.

    Attributes:
        folder: of the run; None on the ranks that write nothing.
        about: which checkpoint or other model it is (run, step, model, weights), and how it computes.
        started: when the scoring began, by time.perf_counter.
        found: what this scoring has found, by part.
        unwritten: the text of core_predictions.jsonl, until the disk has it.
        trouble: why it could not be written; empty where it could.
    """

    folder: Path | None
    about: dict[str, Any]
    started: float
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    unwritten: str | None = None
    trouble: str = ""

    def add(self, part: str, found: dict[str, Any], answers: str | None = None) -> dict[str, Any]:
        """Take what one part has found, and write all that is known.

        Args:
            part: core, bpb or sample.
            found: its fields.
            answers: the text of core_predictions.jsonl, with CORE.

        Returns:
            What base_eval.json holds, or would hold where `trouble` says that it could not be written.
        """
        self.found[part] = found | {"seconds": time.perf_counter() - self.started}
        if answers is not None:
            self.found[part]["answers_sha256"] = digest_of(answers.encode())
            self.unwritten = answers
        scores = EMPTY | self._kept()
        how = {name: self.about.get(name) for name in ("dtype", "attention", "world_size")}
        scores["parts"] = scores.get("parts", {}) | dict.fromkeys(self.found, how)
        for fields in self.found.values():
            scores |= fields
        scores |= self.about
        if self.folder is not None:
            self._write(self.folder, scores)
        return scores

    def _kept(self) -> dict[str, Any]:
        """What the disk has of this checkpoint by earlier scorings, but for parts that were done again."""
        path = None if self.folder is None else self.folder / SCORES
        paths = [] if path is None else [path, _aside(path, self.about)]
        old = next((scores for path in paths if self._is_ours(scores := _read(path))), {})
        return {name: value for name, value in old.items() if _part_of(name) not in self.found}

    def _is_ours(self, scores: dict[str, Any]) -> bool:
        """Whether scores are of the same checkpoint; those of older versions do not say its weights."""
        same = all(scores.get(name) == self.about.get(name) for name in ("step", "model"))
        return bool(scores) and same and scores.get("weights") in (None, self.about.get("weights"))

    def _write(self, folder: Path, scores: dict[str, Any]) -> None:
        self.trouble = ""
        try:
            self._make_place(folder)
            if self.unwritten is not None:
                files.atomic_write(folder / ANSWERS, self.unwritten)
                self.unwritten = None
        except OSError as error:
            self.trouble = f"{folder / ANSWERS}: {error.strerror or error}"
        try:  # the scores are small: they may fit where the answers did not
            files.write_json(folder / SCORES, scores)
        except OSError as error:
            self.trouble = f"{folder / SCORES}: {error.strerror or error}"

    def _make_place(self, folder: Path) -> None:
        """Set aside what is of another checkpoint, and bring back what was set aside of this one."""
        there = _read(folder / SCORES)
        if not (folder / SCORES).exists() or self._is_ours(there):
            return
        for name in (ANSWERS, SCORES):
            if (folder / name).exists():
                (folder / name).replace(_aside(folder / name, there))
        print(f"{folder / SCORES} was of another checkpoint: it is now {_aside(folder / SCORES, there).name}")
        if self._is_ours(_read(_aside(folder / SCORES, self.about))):
            for name in (ANSWERS, SCORES):
                if _aside(folder / name, self.about).exists():
                    _aside(folder / name, self.about).replace(folder / name)


def _aside(path: Path, scores: dict[str, Any]) -> Path:
    """Where a file is set aside: base_eval_step_000100.json."""
    step = scores.get("step")
    label = f"step_{step:06d}" if isinstance(step, int) else "of_a_model" if "model" in scores else "damaged"
    return path.with_name(f"{path.stem}_{label}{path.suffix}")


def _read(path: Path) -> dict[str, Any]:
    """Scores as they lie on the disk; empty where there are none, or damaged ones."""
    try:
        return dict(files.read_json(path, dict[str, Any]))
    except UserError:
        return {}
