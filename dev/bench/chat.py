"""What the quickstart's chat model can do, by seed: the floors of its tasks, its controls, and what RL moves.

    python -m dev.bench.chat [--seeds 0 1 2] [--skip-rl] [--json FILE]

Everything goes through the commands that a user types, at the quickstart's flags, in NANOCHAT_BASE_DIR; a run
that is there is not made again. For each seed: base model, SFT, answers to 400 items of each made task, those
without the calculator, RL on bigsum, and answers after it. The control of the first seed learns the same
replies, dealt to other questions. A rate comes with the lower end of its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nanochat.chat import corpus
from nanochat.common import files
from nanochat.evaluation.core.statistics import exact_mcnemar, wilson

FLOORS = {
    "calc": 90,
    "unit": 90,
    "date": 90,
    "identity": 90,
    "count": 75,
    "repeat": 60,
    "spell": 60,
    "choice": 50,
}
OTHERS = ("spell-new", "choice-steps", "choice-mixed", "pydoc", "bigsum")
ITEMS = 400
BASE = (
    "--corpus stdlib --depth 4 --max-seq-len 256 --total-batch-size 4096 --device-batch-size 16 "
    "--num-iterations 250 --eval-every 0 --eval-tokens 65536 --sample-every 0 --keep-tails"
)
SFT = "--eval-every 0"
RL = "--task bigsum --num-iterations 60 --max-new-tokens 48"
EVAL = f"--max-new-tokens 64 --max-per-task {ITEMS}"
RAISED, MOST_P = 0.25, 1e-6  # what RL has to add, and the p of McNemar's test
NOTHING = 0.05  # what the controls may reach


def command(script: str, *flags: str) -> float:
    """Run a command of scripts/ to its end; returns its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"scripts.{script}", *flags], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def trained(script: str, run: str, *flags: str) -> float | None:
    """Train a run that is not finished yet; returns the seconds of its command, or None."""
    if (files.run_dir(run) / "summary.json").is_file():
        return None
    return command(script, "--run", run, *flags, "--resume", "auto")


def answers(run: str, tasks: str, label: str, *flags: str) -> dict[str, dict[str, bool]]:
    """Whether each item of each task is right: kept in a file of the run."""
    kept = files.run_dir(run) / f"bench-{label}.jsonl"
    if not kept.is_file():
        command("chat_eval", "--run", run, "--tasks", tasks, *EVAL.split(), *flags)
        shutil.copy(files.run_dir(run) / "chat_answers.jsonl", kept)
    found: dict[str, dict[str, bool]] = {}
    for line in map(json.loads, kept.read_text("utf-8").splitlines()):
        found.setdefault(line["task"], {})[line["id"] + line["prompt"]] = bool(line["right"])
    return found


def rate(verdicts: dict[str, bool]) -> dict[str, float]:
    """Rate, number of items, and the lower end of its interval."""
    fraction = sum(verdicts.values()) / len(verdicts)
    return {"rate": fraction, "n": len(verdicts), "at_least": wilson(fraction, len(verdicts))[0]}


def paired(before: dict[str, bool], after: dict[str, bool]) -> dict[str, float]:
    """What the same items have gained, with McNemar's p."""
    lost = sum(before[item] and not after[item] for item in before)
    won = sum(after[item] and not before[item] for item in before)
    return {"gain": (won - lost) / len(before), "won": won, "lost": lost, "p": exact_mcnemar(lost, won)}


def shuffled_corpus(name: str = "made-shuffled") -> str:
    """The corpus `made` with the replies of its conversations dealt to others; returns its name."""
    if not files.data_dir(name).is_dir():
        rows = list(corpus.rows("made", "train"))
        replies = [message for row in rows for message in row["messages"] if message["role"] == "assistant"]
        random.Random(0).shuffle(replies)  # noqa: S311
        path = files.base_dir() / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                messages = [m if m["role"] == "user" else replies.pop() for m in row["messages"]]
                file.write(json.dumps({"messages": messages}) + "\n")
        command("chat_data", "--corpus", "local", "--name", name, "--files", str(path))
    return name


def seed_figures(seed: int, with_rl: bool) -> dict[str, Any]:
    """The figures of one seed, of base model, SFT and RL alike."""
    base, sft, rl, at = f"floor{seed}", f"floor{seed}-sft", f"floor{seed}-rl", ("--seed", str(seed))
    seconds = {"base": trained("base_train", base, *BASE.split(), *at)}
    seconds["sft"] = trained("chat_sft", sft, "--base", base, *SFT.split(), *at)
    tasks = ",".join([*FLOORS, *OTHERS])
    after_sft = answers(sft, tasks, "greedy")
    figures: dict[str, Any] = {
        "seed": seed,
        "tasks": {task: rate(verdicts) for task, verdicts in after_sft.items()},
        "calc without the tool": rate(answers(sft, "calc", "no-tools", "--no-tools")["calc"]),
    }
    if with_rl:
        seconds["rl"] = trained("chat_rl", rl, "--base", sft, *RL.split(), *at)
        after_rl = answers(rl, tasks, "greedy")
        sampled = ("bigsum", "sampled", "--temperature", "1")
        figures["RL"] = {
            "greedy": paired(after_sft["bigsum"], after_rl["bigsum"]),
            "sampled": paired(answers(sft, *sampled)["bigsum"], answers(rl, *sampled)["bigsum"]),
            "others": {task: paired(after_sft[task], after_rl[task])["gain"] for task in FLOORS},
            "after": rate(after_rl["bigsum"]),
        }
    return figures | {"seconds": seconds}


def control_figures() -> dict[str, Any]:
    """What a base model answers, and one that has learned replies to other questions."""
    tasks, control = ",".join(FLOORS), "floor0-shuffled"
    trained("chat_sft", control, "--base", "floor0", "--data", shuffled_corpus(), *SFT.split())
    runs = {"base model": "floor0", "replies to other questions": control}
    found = {name: answers(run, tasks, "greedy", "--max-per-task", "100") for name, run in runs.items()}
    return {name: {task: rate(v) for task, v in by_task.items()} for name, by_task in found.items()}


def misses(figures: dict[str, Any]) -> list[str]:
    """What is below its floor, by name."""
    found = []
    for one in figures["seeds"]:
        low = {task: one["tasks"][task]["at_least"] for task in FLOORS}
        found += [
            f"seed {one['seed']}: {t} {low[t]:.3f}" for t, floor in FLOORS.items() if low[t] < floor / 100
        ]
        if (rl := one.get("RL")) and not (rl["greedy"]["gain"] >= RAISED and rl["greedy"]["p"] < MOST_P):
            found.append(f"seed {one['seed']}: RL {rl['greedy']}")
    for name, by_task in figures.get("controls", {}).items():
        found += [
            f"{name}: {t} {v['rate']:.3f}"
            for t, v in by_task.items()
            if t != "choice" and v["rate"] > NOTHING
        ]
    return found


def main() -> None:
    """Measure, print, and leave with 1 where a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--skip-rl", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    figures: dict[str, Any] = {"commit": commit.strip(), "cores": os.cpu_count(), "seeds": []}
    if not files.data_dir("made").is_dir():
        command("chat_data", "--corpus", "made")
    for seed in args.seeds:
        figures["seeds"].append(seed_figures(seed, not args.skip_rl))
        print(json.dumps(figures["seeds"][-1], indent=1), flush=True)
    if 0 in args.seeds:
        figures["controls"] = control_figures()
    figures["below the floor"] = misses(figures)
    print(
        json.dumps({key: figures[key] for key in ("controls", "below the floor") if key in figures}, indent=1)
    )
    if args.json:
        files.write_json(args.json, figures)
    sys.exit(bool(figures["below the floor"]))


if __name__ == "__main__":
    main()
