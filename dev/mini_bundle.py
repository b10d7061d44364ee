"""Generator of core_mini, the small suite in nanochat/evaluation/core/core_mini, from Python's own library.

    python -m dev.mini_bundle FOLDER

The suite has the format of CORE's bundle, so that a machine without the network exercises all of CORE's code
on a model trained for minutes on the `stdlib` corpus. Its answers stand in that corpus: it tells whether the
pipeline works, and is no benchmark. The files in the library are of Python 3.11.7, so that all machines score
the same questions. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import contextlib
import json
import random
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common.errors import UserError
from nanochat.evaluation.core import bundle

EXAMPLES_PER_TASK = 120
SEED = 0

# Tests, tools and character tables: what installations strip, or what says little about the library.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "encodings"}
)

Record = dict[str, object]


@dataclass
class Material:
    """What the sources say.

    Attributes:
        imports: how many files have `from MODULE import NAME`, by (module, name).
        docs: (first line of a function or class, first sentence of its docstring).
        pairs: in how many files two lines follow each other.
    """

    imports: Counter[tuple[str, str]] = field(default_factory=Counter)
    docs: list[tuple[str, str]] = field(default_factory=list)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class MiniTask:
    """One task of the suite: its entry in core.yaml, its baseline, and what makes its examples."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline_percent: int
    make: Callable[[Material, random.Random], list[Record]]


def build() -> dict[str, str]:
    """All files of the bundle, by path: core.yaml, eval_meta_data.csv and eval_data/*.jsonl.

    Raises:
        UserError: this Python installation has too few library sources.
    """
    material = gather(_library_texts(Path(sysconfig.get_paths()["stdlib"])))
    texts, entries, baselines = dict[str, str](), [], ["Eval Task,Random baseline\n"]
    for task in TASKS:
        records = task.make(material, random.Random(f"{SEED}/{task.label}"))  # noqa: S311
        if len(records) < EXAMPLES_PER_TASK:
            raise UserError(
                f"core_mini: only {len(records)} examples for {task.label}; this Python installation lacks "
                "most of the standard library's sources. Install the full one."
            )
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records[:EXAMPLES_PER_TASK])
        texts[f"eval_data/{task.label}.jsonl"] = "".join(lines)
        baselines.append(f"{task.label},{task.baseline_percent}\n")
        entry = {"label": task.label, "dataset_uri": f"{task.label}.jsonl", "num_fewshot": [task.shots]}
        entries.append(entry | {"icl_task_type": task.kind, "continuation_delimiter": task.delimiter})
    core_yaml = json.dumps({"icl_tasks": entries})  # a JSON text is a YAML text too
    return {bundle.LIST: core_yaml, bundle.BASELINES: "".join(baselines), **texts}


def _library_texts(root: Path) -> Iterable[str]:
    """Sources of the library, in the order of their paths."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):
                yield path.read_bytes().decode("utf-8")


def gather(sources: Iterable[str]) -> Material:
    """Read imports, docstrings and repeated lines out of Python sources; skips those that do not parse."""
    material = Material()
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.split("\n")
        imports: set[tuple[str, str]] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imports.update((node.module, name.name) for name in node.names if name.name != "*")
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                sentence = _first_sentence(ast.get_docstring(node) or "")
                head = lines[node.lineno - 1].strip()
                if sentence and head.endswith(":"):
                    material.docs.append((head, sentence))
        material.imports.update(imports)
        full = [line.rstrip() for line in lines if line.strip()]
        material.pairs.update(set(zip(full, full[1:], strict=False)))
    return material


def _first_sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line, if it has 6 to 25 words; else nothing."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0]
    plain = sentence.isprintable() and sentence.isascii() and sentence[:1].isupper()
    return sentence if plain and 6 <= len(sentence.split()) <= 25 else ""


def _frequent_imports(material: Material) -> list[tuple[str, str]]:
    """(module, name) pairs found in at least two files, most frequent first."""
    found = [(-count, pair) for pair, count in material.imports.items() if count > 1]
    return [pair for _, pair in sorted(found)]


def _import_name(material: Material, rng: random.Random) -> list[Record]:
    """Which of four names is imported from this module?"""
    pairs = _frequent_imports(material)
    modules: dict[str, set[str]] = defaultdict(set)
    for module, name in pairs:
        modules[name].add(module)
    records = []
    for index, (module, name) in enumerate(pairs):
        near = pairs[max(0, index - 20) : index + 21]  # names about as frequent
        others = sorted({other for _, other in near if module not in modules[other]})
        if len(others) >= 3:
            choices, gold = _shuffled(name, rng.sample(others, 3), rng)
            records.append({"query": f"from {module} import", "choices": choices, "gold": gold})
    return records


def _docstring_ending(material: Material, rng: random.Random) -> list[Record]:
    """Which of four endings belongs to this beginning of a docstring?"""
    halves = []
    for sentence in {sentence for _, sentence in material.docs}:
        words = sentence.split()
        middle = len(words) // 2
        halves.append((" ".join(words[:middle]), " ".join(words[middle:])))
    halves.sort(key=lambda half: (len(half[1]), half))
    records = []
    for index in rng.sample(range(len(halves)), min(len(halves), EXAMPLES_PER_TASK)):
        beginning, ending = halves[index]
        near = halves[max(0, index - 10) : index + 11]  # endings about as long
        others = sorted({other for _, other in near if other != ending})
        choices, gold = _shuffled(ending, rng.sample(others, 3), rng)
        records.append({"query": beginning, "choices": choices, "gold": gold})
    return records


def _shuffled(right: str, wrong: Sequence[str], rng: random.Random) -> tuple[list[str], int]:
    """The options of a question in any order, and the index of the right one."""
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def _import_module(material: Material, rng: random.Random) -> list[Record]:
    """From which of two modules is this name imported?"""
    pairs = _frequent_imports(material)
    modules = sorted({module for module, _ in pairs})
    records = []
    for module, name in pairs:
        other = rng.choice([one for one in modules if (one, name) not in material.imports])
        options, gold = _shuffled(f"from {module}", [f"from {other}"], rng)
        records.append({"context_options": options, "continuation": f"import {name}", "gold": gold})
    return records


def _docstring_owner(material: Material, rng: random.Random) -> list[Record]:
    """Which of two definitions has this docstring?"""
    docs = sorted(set(material.docs))
    known = set(docs)
    records = []
    for head, sentence in rng.sample(docs, min(len(docs), EXAMPLES_PER_TASK)):
        other = rng.choice([one for one, _ in docs if (one, sentence) not in known])
        options, gold = _shuffled(head, [other], rng)
        records.append({"context_options": options, "continuation": sentence, "gold": gold})
    return records


def _repeated_line(material: Material, rng: random.Random) -> list[Record]:
    """The last word of a line of code, after the line before it."""
    return _endings(material, rng, lambda line: not line.lstrip().startswith("#"))


def _repeated_comment(material: Material, rng: random.Random) -> list[Record]:
    """The last word of a line of a comment, after the line before it."""
    return _endings(material, rng, lambda line: line.lstrip().startswith("# "))


def _endings(material: Material, rng: random.Random, wanted: Callable[[str], bool]) -> list[Record]:
    """Pairs of lines that stand in the most files, without their last word."""
    found = []
    for (before, line), count in material.pairs.items():
        context, _, last = line.rpartition(" ")
        # Two words before the last one: enough to know the line by.
        if count > 1 and wanted(line) and wanted(before) and len(context.split()) > 1 and last:
            found.append((-count, f"{before.strip()}\n{context}", last))
    chosen = sorted(found)[:EXAMPLES_PER_TASK]
    rng.shuffle(chosen)
    return [{"context": context, "continuation": last} for _, context, last in chosen]


TASKS = (
    MiniTask("import_name", "multiple_choice", 3, " ", 25, _import_name),
    MiniTask("docstring_ending", "multiple_choice", 0, " ", 25, _docstring_ending),
    MiniTask("import_module", "schema", 1, " ", 50, _import_module),
    MiniTask("docstring_owner", "schema", 0, '\n    """', 50, _docstring_owner),
    MiniTask("repeated_line", "language_modeling", 0, " ", 0, _repeated_line),
    MiniTask("repeated_comment", "language_modeling", 2, " ", 0, _repeated_comment),
)


def main() -> None:
    """Write the suite into a folder."""
    for name, text in build().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    main()
