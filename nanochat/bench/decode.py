"""Decoding speed: tokens/s of the engine when several requests come at once, each case in a fresh process.

A reply's first token belongs to the prefill. What is timed are the steps after every request has its first token;
all of them then draw for all requests. Beside it stands the bandwidth bound: what a step must read over what this
machine reads in the same run. Weights and prompts are random; prompts differ from run to run, so that the prefix
cache finds only what `--shared` puts there.

    nanochat bench decode [--json]       or, where there is only torch: python -m nanochat.bench.decode
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from nanochat.bench import apart, growth, speed, trained
from nanochat.bench.measure import Measurement, at_least, best_precision, parse, parser, show, whole
from nanochat.bench.setup import room
from nanochat.checkpoint import read_config
from nanochat.config import ModelConfig
from nanochat.engine.runner import Precision
from nanochat.files import Folder

PRECISIONS = get_args(Precision)
DEPTH = 6
HEAD_DIM = 128
SMALL_VOCABULARY, LARGE_VOCABULARY = 8192, 32_768
LARGE_DEPTH = 12  # from here on the vocabulary is the large one
STEP_TOKENS = 512  # of a step; 16 for each request where that is more
TILE = 128  # what a context is a multiple of


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `nanochat bench decode`."""
    options = _options()
    args = parse(options, argv)
    try:
        settle(args)
        show(measure(args), as_json=args.json)
    except (ValueError, OSError) as error:
        options.error(str(error))
    except (RuntimeError, MemoryError) as error:  # of a process that measures
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> Iterator[Measurement]:
    """What is asked for; the batches and the prefill if nothing else is."""
    if args.trained:
        yield from trained.measure(args)
    if args.lengths:
        rows = []
        for row in growth.measure(args):
            rows.append(row.as_dict())
            yield row
        if args.plot:
            growth.draw(rows, args.plot)
    if args.start:
        yield from apart.starts(args)
    if args.mixed:
        yield from apart.mixed(args)
    if args.turns:
        yield from apart.chats(args)
    if not _instead(args):
        yield from speed.batches(args)
        yield from speed.prefill(args)


def _instead(args: argparse.Namespace) -> bool:
    """Whether something else than the batches is asked for."""
    return bool(args.trained or args.lengths or args.start or args.mixed or args.turns)


def settle(args: argparse.Namespace) -> None:
    """Fills in what follows: config, vocabulary, precision, step_tokens. ValueError for what cannot be."""
    everything = list(PRECISIONS) if args.trained else [best_precision(args.device)]
    args.precision = args.precision or everything
    args.step_tokens = args.step_tokens or max(STEP_TOKENS, 16 * max(args.batch))
    if args.step_tokens <= max(args.batch):
        raise ValueError(
            f"--step-tokens is {args.step_tokens}; a step needs one token for each of {max(args.batch)} requests "
            f"and some for new prompts, so use at least {2 * max(args.batch)}"
        )
    if args.shared >= args.prompt:
        raise ValueError(f"--shared is {args.shared}, but a prompt has {args.prompt} tokens; use less")
    if args.plot and not args.lengths:
        raise ValueError("--plot draws what --lengths measures; give both")
    if bool(args.trained) != bool(args.text):
        raise ValueError("--trained needs --text, and --text needs --trained: a bundle, and texts it has not seen")
    if args.turns == 1:
        raise ValueError("--turns is 1; the last turn of a chat is compared with its second, so use 2 or more")
    if args.against and _instead(args):
        raise ValueError(
            "--against compares batches and prefill; leave out --trained, --lengths, --start, --mixed and --turns"
        )
    for option, module in ((args.plot, "matplotlib"), (args.against, "transformers")):
        if option and not find_spec(module):
            raise ValueError(f"{module} is not installed here; install it, or leave out {option}")
    need = _longest(args)
    if args.trained:
        _settle_trained(args, need)
    else:
        _settle_random(args, need)


def _settle_trained(args: argparse.Namespace, need: int) -> None:
    given = [name for name in ("depth", "head_dim", "kv_heads", "vocabulary", "context") if getattr(args, name)]
    if given:
        raise ValueError(f"--trained has a config of its own; leave out --{', --'.join(given).replace('_', '-')}")
    args.config, args.vocabulary = read_config(Folder(args.trained))
    if need > args.config.context:
        raise ValueError(
            f"the context of {args.trained} is {args.config.context} tokens, and this needs {need}; "
            "use a smaller --prompt or --new"
        )


def _settle_random(args: argparse.Namespace, need: int) -> None:
    tiles = -(-need // TILE) * TILE
    args.context = args.context or tiles
    if args.context < need:
        raise ValueError(
            f"--context is {args.context}, but the longest text here has {need} tokens (prompt, new ones, and those "
            f"that the first requests draw while the last are read); use {tiles}, or a smaller --prompt or --new"
        )
    depth = args.depth or DEPTH
    args.config = ModelConfig(
        depth=depth, context=args.context, kv_heads=args.kv_heads, head_dim=args.head_dim or HEAD_DIM
    )
    args.vocabulary = args.vocabulary or (SMALL_VOCABULARY if depth < LARGE_DEPTH else LARGE_VOCABULARY)


def _longest(args: argparse.Namespace) -> int:
    """Tokens of the longest text that will be there."""
    texts = [(length, args.new, 1) for length in args.lengths]
    if args.trained or args.start:
        texts.append((args.prompt, args.new, 1))
    if args.mixed:
        texts.append((args.prompt, args.new, max(args.batch)))
    if args.turns:
        texts.append((args.turns * (args.prompt + args.new), 1, 1))
    if not texts:
        texts = [(args.prompt, args.new, batch) for batch in args.batch]
        texts += [(args.prefill, 1, 1)] if args.prefill else []
    return max(room(args, *text) for text in texts)


def _options() -> argparse.ArgumentParser:
    options = parser(
        "decode", "Tokens/s of the engine's greedy replies to random prompts; the model's weights are random."
    )
    _model_options(options)
    add = options.add_argument
    add("--batch", type=whole, nargs="+", default=[1, 8, 32], help="requests at once (default: 1 8 32)")
    add("--prompt", type=whole, default=256, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=whole, default=32, help="steps that are timed (default: %(default)s)")
    add(
        "--prefill",
        type=at_least(0),
        default=512,
        help="tokens of the prompt whose prefill is timed; 0: none (default: %(default)s)",
    )
    add(
        "--shared",
        type=at_least(0),
        default=0,
        help="first tokens that all prompts have in common (default: %(default)s)",
    )
    add("--step-tokens", type=whole, help=f"most tokens of a step (default: {STEP_TOKENS}, or 16 a request)")
    add(
        "--speculate",
        type=at_least(0),
        default=0,
        help="most tokens to be guessed a step (default: %(default)s). Random weights soon repeat themselves, and then "
        "every guess is right: leave it at 0 in comparisons",
    )
    add("--runs", type=whole, default=5, help="times each case is measured (default: %(default)s)")
    add("--torch", action="store_true", help="keep the native kernel out")
    add(
        "--deterministic",
        action="store_true",
        help="tokens that depend on no other request; without --against, the baseline is the same without it",
    )
    add("--against", choices=("transformers",), help="measure the peer too, its fastest path, in turn with ours")
    instead = options.add_argument_group("instead of the batches")
    add = instead.add_argument
    add(
        "--lengths",
        type=whole,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="time per token with and without a cache after so many tokens of text",
    )
    add("--plot", type=Path, metavar="PNG", help="draw them")
    add(
        "--start",
        action="store_true",
        help="seconds from the start of a process to its first token, weights from a file",
    )
    add(
        "--mixed",
        type=whole,
        metavar="REQUESTS",
        help="share of so many requests that get other tokens among others than alone",
    )
    add(
        "--turns",
        type=whole,
        help="time to the first token of the last of so many turns of a chat; each asks --prompt tokens, gets --new",
    )
    add(
        "--trained",
        type=Path,
        metavar="BUNDLE",
        help="size, bits per byte and speed of a trained model in each precision",
    )
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="held-out texts for it: files, or the data folder of a corpus",
    )
    return options


def _model_options(options: argparse.ArgumentParser) -> None:
    add = options.add_argument_group("the model").add_argument
    add("--depth", type=whole, help=f"layers, each 64 wide (default: {DEPTH})")
    add("--head-dim", type=whole, help=f"size of a head (default: {HEAD_DIM})")
    add("--kv-heads", type=whole, help="key heads (default: as many as query heads)")
    add(
        "--vocabulary",
        type=whole,
        help=f"tokens (default: {SMALL_VOCABULARY}; {LARGE_VOCABULARY} from depth {LARGE_DEPTH} on)",
    )
    add("--context", type=whole, help="tokens (default: what is needed)")
    add("--precision", nargs="+", choices=PRECISIONS, help="of the weights (default: bf16 where the processor has it)")


if __name__ == "__main__":
    raise SystemExit(main())
