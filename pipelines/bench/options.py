"""The options of `nanochat bench serve`, and what follows from them before anything is started."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from nanochat.bench.measure import at_least, best_precision, parser, whole
from nanochat.config import ModelConfig
from nanochat.tokenizer import SPECIAL
from pipelines.bench.target import BYTES, LETTERS
from pipelines.spec import Capacity

PRECISIONS = ("bf16", "fp32", "int8")
DEPTH, LARGE_DEPTH = 6, 12
SMALL_VOCABULARY, LARGE_VOCABULARY = 8192, 32_768
TILE = 128  # what a context is a multiple of
CLIENTS = 32
TRACE_CONTEXT = 1024
SECONDS, RUNS, LOAD = 20.0, 3, 0.5
OF_THE_MODEL = ("depth", "head_dim", "kv_heads", "context", "precision", "replicas", "max_batch", "step_tokens")
OF_A_URL = ("model", "key", "chat", "ignore_eos")


def positive(most: float = float("inf")) -> Callable[[str], float]:
    """Reads a number above 0."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most or value == float("inf"):
            upto = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0{upto}")
        return value

    return read


def settle(args: argparse.Namespace) -> None:
    """Fills in what follows from other options. ValueError for what cannot be."""
    _check(args)
    alone = not (args.clients or args.rate or args.load or args.trace)
    args.load = LOAD if alone else args.load
    args.closed = not args.rate and (not args.trace or bool(args.load))
    args.open = bool(args.rate or args.load or args.trace)
    args.clients = args.clients or CLIENTS
    args.seconds = None if args.requests else args.seconds or SECONDS
    if not args.url:
        settle_model(args)


def _check(args: argparse.Namespace) -> None:
    given = [name for name in (OF_THE_MODEL if args.url else OF_A_URL) if getattr(args, name)]
    said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    traced = [name for name in ("minutes", "scale_time", "scale_tokens") if getattr(args, name)]
    wrong = {
        f"a service that is there has a model of its own; leave out {said}": bool(given and args.url),
        f"{said}: for a service that is there; add its URL": bool(given and not args.url),
        "--rate is an open loop by itself; leave out --trace, --load and --clients": bool(
            args.rate and (args.trace or args.load or args.clients)
        ),
        f"--{'/'.join(traced).replace('_', '-')} is about a trace; give it with --trace FILE": bool(
            traced and not args.trace
        ),
        "--load finds the scale of the times by itself; leave out --scale-time": bool(args.scale_time and args.load),
        "--seconds and --requests both say how long a run is; give one of them": bool(args.seconds and args.requests),
        f"--plot is {args.plot}; a picture's name ends with .svg, .png or .pdf": bool(
            args.plot and args.plot.suffix not in (".svg", ".png", ".pdf")
        ),
        "matplotlib is not installed here; install it, or leave out --plot": bool(
            args.plot and not find_spec("matplotlib")
        ),
        f"--shared is {args.shared}, but a prompt has {args.prompt} tokens; use less": bool(
            args.shared >= args.prompt and not args.trace
        ),
    }
    found = [words for words, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError("; ".join(found))


def settle_model(args: argparse.Namespace) -> None:
    """The model of random weights."""
    need = args.prompt + args.new
    tiles = TRACE_CONTEXT if args.trace else -(-need // TILE) * TILE
    args.context = args.context or tiles
    if not args.trace and args.context < need:
        raise ValueError(
            f"--context is {args.context}, but a prompt and its reply have {need} tokens; use {tiles}, or a smaller "
            "--prompt or --new"
        )
    depth = args.depth or DEPTH
    args.config = ModelConfig(depth=depth, context=args.context, kv_heads=args.kv_heads, head_dim=args.head_dim or 128)
    args.vocabulary = args.vocabulary or (SMALL_VOCABULARY if depth < LARGE_DEPTH else LARGE_VOCABULARY)
    fewest, most = BYTES + len(SPECIAL) + 1, BYTES + len(SPECIAL) + len(LETTERS) ** 4
    if not fewest <= args.vocabulary <= most:
        raise ValueError(f"--vocabulary is {args.vocabulary}; use {fewest} to {most}")
    args.precision = args.precision or best_precision(args.device)
    args.replicas = args.replicas or 1
    args.max_batch = args.max_batch or args.clients
    args.step_tokens = args.step_tokens or Capacity().step_tokens


def options() -> argparse.ArgumentParser:
    """All of them; --device, --threads, --commit and --json are every benchmark's."""
    found = parser(
        "serve",
        "Time to the first token, time between tokens, latency and tokens/s of a service under load. Without URL: of a "
        "service on this machine with a model of random weights, beside the bare engine. Without options: 32 clients "
        "that each ask again when their reply ends, then requests at random times at half of what that reached.",
    )
    add = found.add_argument
    add("url", nargs="?", metavar="URL", help="a running service of OpenAI's shape, such as http://127.0.0.1:8000")
    add("--plot", type=Path, metavar="FILE", help="draw the last load, as .svg, .png or .pdf")
    _load(found)
    model_options(found)
    add = found.add_argument_group("a service that is there").add_argument
    add("--model", metavar="NAME", help="which of its models (default: the first)")
    add("--key", help="its API key")
    add(
        "--chat",
        action="store_true",
        help="ask /v1/chat/completions in random words; else /v1/completions in token ids",
    )
    add("--ignore-eos", action="store_true", help="vLLM's: replies do not end by themselves")
    return found


def _load(found: argparse.ArgumentParser) -> None:
    add = found.add_argument_group("the load").add_argument
    add(
        "--clients",
        type=whole,
        metavar="N",
        help=f"closed loop: each asks again when its reply ends (default: {CLIENTS})",
    )
    add("--rate", type=positive(), metavar="R", help="open loop: requests a second, at random (Poisson) times")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="open loop: times and lengths of a trace, Azure's CSV or Mooncake's JSON lines",
    )
    add(
        "--load", type=positive(2), metavar="SHARE",
        help="open loop at this share of the tokens/s that a closed loop reaches first (default, where nothing else is "
        f"asked for: {LOAD})",
    )  # fmt: skip
    add("--minutes", type=positive(), help="how much of the trace (default: all)")
    add("--scale-time", type=positive(), metavar="X", help="multiplies the trace's times; 2 is half the load")
    add(
        "--scale-tokens", type=positive(), metavar="X",
        help="multiplies the trace's lengths (default: so that 99%% of its requests fit the context)",
    )  # fmt: skip
    add("--prompt", type=whole, default=256, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=whole, default=128, help="tokens of a reply (default: %(default)s)")
    add("--shared", type=at_least(0), default=0, help="first tokens that all prompts have in common (default: 0)")
    add("--seconds", type=positive(), help=f"of a run; replies that have begun end first (default: {SECONDS:g})")
    add("--requests", type=whole, help="of a run, instead of seconds")
    add("--runs", type=whole, default=RUNS, help="of each load; a trace is run once (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="of prompts and times (default: 0)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token, always (default: 0)")
    add("--timeout", type=positive(), default=120.0, help="seconds after which a client gives up (default: 120)")
    add(
        "--slo-ttft",
        type=positive(),
        default=1000.0,
        metavar="MS",
        help="goodput: time to the first token (default: 1000)",
    )
    add(
        "--slo-tpot",
        type=positive(),
        default=100.0,
        metavar="MS",
        help="goodput: mean time of each further token (default: 100)",
    )


def model_options(found: argparse.ArgumentParser) -> None:
    """Of the model of random weights and its service."""
    add = found.add_argument_group("without URL: the model and its service").add_argument
    add("--depth", type=whole, help=f"layers, each 64 wide (default: {DEPTH})")
    add("--head-dim", type=whole, help="size of a head (default: 128)")
    add("--kv-heads", type=whole, help="key heads (default: as many as query heads)")
    add(
        "--vocabulary", type=whole,
        help=f"tokens (default: {SMALL_VOCABULARY}; {LARGE_VOCABULARY} from depth {LARGE_DEPTH} on; with URL: prompts "
        f"are random ids below it, by default {BYTES})",
    )  # fmt: skip
    add("--context", type=whole, help=f"tokens (default: what is needed; {TRACE_CONTEXT} for a trace)")
    add("--precision", choices=PRECISIONS, help="of the weights (default: bf16 where the processor has it)")
    add("--replicas", type=whole, help="each with --threads (default: 1)")
    add("--max-batch", type=whole, help="replies that a replica makes at a time (default: as many as clients)")
    add("--step-tokens", type=whole, help="most tokens that a replica computes in a step (default: 128)")
