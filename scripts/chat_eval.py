"""Score a chat model: `python -m scripts.chat_eval --run d12-sft --tasks made,chatcore`, or with torchrun."""

from __future__ import annotations

from nanochat.chat import evaluate
from nanochat.common import errors, files, run_files
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import ChatEvalArgs
from nanochat.distributed import world
from nanochat.distributed.world import World
from nanochat.evaluation import chat_scores
from nanochat.evaluation.base_eval import show_chat, show_difference
from nanochat.evaluation.chat_scores import ChatResult


@errors.cli
def main() -> None:
    """Parse; score a run, or compare two."""
    args = arguments.parse(ChatEvalArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        if args.compare:
            _compare(args.compare, ranks)
            return
        result = evaluate.run(args, ranks)
        if ranks.is_main:
            show_chat(result.as_dict())
            print(f"written: {files.run_dir(args.run) / 'chat_eval.json'}")


def _compare(runs: tuple[str, ...], world: World) -> None:
    """Print what run B has more than run A by item.

    Raises:
        UserError: not two runs, one that was not scored, or two that were asked different items.
    """
    if len(runs) != 2:
        raise UserError(f"--compare {' '.join(runs)}: expected two runs, A and B.")
    (about_a, a), (about_b, b) = map(run_files.read_chat_answers, runs)
    asked_a, asked_b = ({(x["task"], x["id"], x["sample"], x["prompt"]) for x in one} for one in (a, b))
    if asked_a != asked_b:
        raise UserError(
            f"runs {runs[0]!r} and {runs[1]!r} were asked different items. Score both with the same --tasks, "
            "--max-per-task, --num-samples and --seed."
        )
    if world.is_main:
        show_difference(runs, *chat_scores.compare(ChatResult(tuple(a)), ChatResult(tuple(b))))
        for name, value in about_a["settings"].items():
            if value != (other := about_b["settings"].get(name)):
                print(f"{name} was {value} for {runs[0]}, {other} for {runs[1]}")


if __name__ == "__main__":
    main()
