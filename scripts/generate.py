"""Continue prompts with a trained model: `python -m scripts.generate --run d12 "Once upon a time"`."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator

from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import console, errors, machine
from nanochat.common.errors import UserError
from nanochat.common.progress import printable
from nanochat.config import arguments
from nanochat.config.arguments import GenerateArgs
from nanochat.engine import Completion, Engine, Sampling
from nanochat.model import attention_backends, decode_step


@errors.cli
def main() -> None:
    """Parse, load, continue: one prompt as a stream, several together."""
    args = arguments.parse(GenerateArgs)
    if not args.run or not args.prompt:
        raise UserError(
            'name a run and give a prompt: python -m scripts.generate --run d12 "Once upon a time"'
        )
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    device = machine.detect_device(args.device_type)
    precision, _ = attention_backends.choose_precision(device, args.dtype, args.attention)
    model, tokenizer, _ = checkpoint_state.load_model(args.run, args.step, device=device, precision=precision)
    decode_step.use_weights(model, args.weights)
    engine = Engine(model, tokenizer)
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in args.prompt]
    if len(prompts) == 1 and args.num_samples == 1:
        pieces: Iterator[str] = itertools.chain(args.prompt, engine.stream(prompts[0], sampling), ["\n"])
    else:
        done = in_order(engine.completions(prompts, sampling, args.num_samples), args.num_samples)
        rule = f"\n{'-' * 40}\n"
        pieces = (args.prompt[index] + tokenizer.decode(one.ids) + rule for index, one in done)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
        if console.reader_is_gone():
            return


def in_order(done: Iterator[tuple[int, Completion]], num_samples: int) -> Iterator[tuple[int, Completion]]:
    """The completions of the first prompt, then those of the second: each as soon as it is its turn."""
    waiting: defaultdict[int, deque[Completion]] = defaultdict(deque)
    given = 0
    for index, completion in done:
        waiting[index].append(completion)
        while turn := waiting[given // num_samples]:
            yield given // num_samples, turn.popleft()
            given += 1


if __name__ == "__main__":
    main()
