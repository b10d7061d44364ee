"""Continue prompts with a trained model: `python -m scripts.generate --run d12 "Once upon a time"`."""

from __future__ import annotations

from nanochat import backends, checkpoint, config, errors, hardware
from nanochat.config import GenerateArgs
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError


@errors.cli
def main() -> None:
    """Parse, load, continue: one prompt as a stream, several together."""
    args = config.parse(GenerateArgs)
    if not args.run or not args.prompt:
        raise UserError(
            'name a run and give a prompt: python -m scripts.generate --run d12 "Once upon a time"'
        )
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    device = hardware.detect_device(args.device_type)
    precision, _ = backends.choose_precision(device, args.dtype, args.attention)
    model, tokenizer, _ = checkpoint.load_model(args.run, args.step, device=device, precision=precision)
    engine = Engine(model, tokenizer)
    prompts = [engine.encode(prompt) for prompt in args.prompt]
    if len(prompts) == 1 and args.num_samples == 1:
        print(args.prompt[0], end="", flush=True)
        for piece in engine.stream(prompts[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    for prompt, completions in zip(
        args.prompt, engine.generate(prompts, sampling, args.num_samples), strict=True
    ):
        for completion in completions:
            print(prompt + tokenizer.decode(completion.ids), "-" * 40, sep="\n", flush=True)


if __name__ == "__main__":
    main()
