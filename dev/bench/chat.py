"""What the quickstart's chat model can do, by seed: the floors of its tasks, its controls, and what RL moves.

    python -m dev.bench.chat [--seeds 0 1 2] [--skip-rl] [--json FILE]

Everything goes through the commands that a user types, at the quickstart's flags, in NANOCHAT_BASE_DIR; a run
that is there is not made again. For each seed: base model, SFT, answers to 400 items of each made task, those
without the calculator, RL on bigsum, and answers after it; the same RL with rewards dealt to other replies.
One more control, of seed 0, learns the same replies dealt to other questions. A rate comes with the lower end
of its 95 % interval (Wilson).
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
RL = "--task bigsum --max-new-tokens 48"
EVAL = f"--max-new-tokens 64 --max-per-task {ITEMS}"
RAISED, MOST_P = 0.25, 1e-6  # what RL has to add, and the p of McNemar's test
LOST, MOVED = 0.02, 0.03  # what it may take from other tasks, and what shuffled rewards may change
NOTHING, WITHOUT_TOOL = 0.05, 0.30  # what the controls may reach


def command(module: str, *flags: str) -> float:
    """Run a command to its end; returns its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *flags], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def trained(module: str, run: str, *flags: str) -> float | None:
    """Train a run that is not finished yet; returns the seconds of its command, or None."""
    if (files.run_dir(run) / "summary.json").is_file():
        return None
    return command(module, "--run", run, *flags, "--resume", "auto")


def answers(run: str, tasks: str, label: str, *flags: str) -> dict[str, dict[str, bool]]:
    """Whether each item of each task is right: kept in a file of the run."""
    kept = files.run_dir(run) / f"bench-{label}.jsonl"
    if not kept.is_file():
        command("scripts.chat_eval", "--run", run, "--tasks", tasks, *EVAL.split(), *flags)
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
        command("scripts.chat_data", "--corpus", "local", "--name", name, "--files", str(path))
    return name


def seed_figures(seed: int, with_rl: bool) -> dict[str, Any]:
    """The figures of one seed, of base model, SFT and RL alike."""
    base, sft, at = f"floor{seed}", f"floor{seed}-sft", ("--seed", str(seed))
    seconds = {"base": trained("scripts.base_train", base, *BASE.split(), *at)}
    seconds["sft"] = trained("scripts.chat_sft", sft, "--base", base, *SFT.split(), *at)
    tasks = ",".join([*FLOORS, *OTHERS])
    after_sft = answers(sft, tasks, "greedy")
    figures: dict[str, Any] = {
        "seed": seed,
        "tasks": {task: rate(verdicts) for task, verdicts in after_sft.items()},
        "calc without the tool": rate(answers(sft, "calc", "no-tools", "--no-tools")["calc"]),
    }
    if with_rl:
        for name, module in (("rl", "scripts.chat_rl"), ("rl-shuffled", "dev.bench.shuffled_rewards")):
            seconds[name] = trained(module, f"floor{seed}-{name}", "--base", sft, *RL.split(), *at)
            figures[name] = changes(sft, f"floor{seed}-{name}", after_sft)
    return figures | {"seconds": seconds}


def changes(sft: str, rl: str, before: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """What a run of RL has changed: on bigsum, greedy and as it samples, and on the tasks with a floor."""
    after, sampled = answers(rl, ",".join(before), "greedy"), ("bigsum", "sampled", "--temperature", "1")
    return {
        "greedy": paired(before["bigsum"], after["bigsum"]),
        "sampled": paired(answers(sft, *sampled)["bigsum"], answers(rl, *sampled)["bigsum"]),
        "others": {task: paired(before[task], after[task]) for task in FLOORS},
        "after": rate(after["bigsum"]),
    }


def control_figures() -> dict[str, Any]:
    """What a base model answers, and one that has learned replies to other questions."""
    tasks, control = ",".join(FLOORS), "floor0-replies"
    trained("scripts.chat_sft", control, "--base", "floor0", "--data", shuffled_corpus(), *SFT.split())
    runs = {"base model": "floor0", "replies to other questions": control}
    found = {name: answers(run, tasks, "greedy", "--max-per-task", "100") for name, run in runs.items()}
    return {name: {task: rate(v) for task, v in by_task.items()} for name, by_task in found.items()}


def misses(figures: dict[str, Any]) -> list[str]:
    """What is below its floor or above its limit, by name."""
    found = []
    for one in figures["seeds"]:
        rates = {task: one["tasks"][task]["at_least"] for task in FLOORS}
        wrong = [f"{task} {rates[task]:.3f}" for task, floor in FLOORS.items() if rates[task] < floor / 100]
        if (without := one["calc without the tool"]["rate"]) >= WITHOUT_TOOL:
            wrong.append(f"calc without the tool {without:.3f}")
        for way in ("greedy", "sampled") if "rl" in one else ():
            real, shuffled = one["rl"][way], one["rl-shuffled"][way]
            if real["gain"] < RAISED or real["p"] >= MOST_P:
                wrong.append(f"RL, {way}: {real}")
            if abs(shuffled["gain"]) >= MOVED:
                wrong.append(f"shuffled rewards, {way}: {shuffled}")
        others = one.get("rl", {}).get("others", {})
        wrong += [f"RL, {task}: {change}" for task, change in others.items() if change["gain"] <= -LOST]
        found += [f"seed {one['seed']}: {what}" for what in wrong]
    for name, by_task in figures.get("controls", {}).items():
        above = [task for task, v in by_task.items() if task != "choice" and v["rate"] > NOTHING]
        found += [f"{name}: {task} {by_task[task]['rate']:.3f}" for task in above]
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
        command("scripts.chat_data", "--corpus", "made")
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
