"""The measurements as a table for people; JSON lines are measure.py's."""

import json
from collections.abc import Iterable
from typing import Any

from nanochat.bench.measure import Measurement

TIMES = {
    "ttft_s": "time to first token",
    "between_tokens_s": "time between tokens",
    "latency_s": "latency",
    "sent_late_s": "requests sent late by",
}
COLUMNS = ("p50", "p90", "p99", "mean", "max")


def tell(measured: Iterable[Measurement], *, as_json: bool) -> None:
    """Prints each as soon as it is there."""
    for number, one in enumerate(measured):
        if as_json:
            print(json.dumps(one.as_dict()), flush=True)
            continue
        if number == 0:
            print(", ".join(f"{name} {value}" for name, value in one.machine.items()))
        print("\n" + "\n".join(lines(one)), flush=True)


def lines(one: Measurement) -> list[str]:
    """One measurement."""
    more = one.more
    found = [f"{one.case}: {more['requests']} requests, {sum(more['errors'].values())} with an error, "
             f"{more['seconds']:,.0f} s in {one.runs} {'run' if one.runs == 1 else 'runs'}"]  # fmt: skip
    read, drawn = more["prompt_tokens_per_s"], more["reply_tokens_per_s"]
    spread = f" ({one.min:,.0f} to {one.max:,.0f})" if one.unit == "tokens/s" and one.runs > 1 else ""
    found.append(
        f"  {drawn:,.0f} tokens/s out{spread}, {read:,.0f} in, {more['requests_per_s']:.3g} requests/s, "
        f"{more['in_flight']:.1f} in flight"
    )
    if one.unit == "tokens/s" and one.baseline_value:
        found.append(
            f"  {one.value / one.baseline_value:.0%} of the {one.baseline}'s {one.baseline_value:,.0f} tokens/s"
        )
    found.append(f"  {'milliseconds':<26}" + "".join(f"{name:>10}" for name in COLUMNS))
    found += _times(more)
    if one.baseline and isinstance(engine := more.get("engine"), dict):
        found.append(f"  the {one.baseline}")
        found += _times(engine)
    if added := more.get("added_ttft_s"):
        told = ", ".join(f"{1e3 * seconds:.1f} ms to its {name}" for name, seconds in added.items())
        found.append(f"  to the time to the first token the service adds {told}")
    if "replicas" in more:
        found += _scale(more)
    slo = more["slo"]
    found.append(
        f"  goodput {more['goodput_requests_per_s']:.3g} requests/s: first token within {1e3 * slo['ttft_s']:g} ms, "
        f"{1e3 * slo['per_token_s']:g} ms a token"
    )
    for kind, count in more["errors"].items():
        found.append(f"  {kind}: {count} times; {more['said'][kind]}")
    if more["short_replies"]:
        found.append(f"  {more['short_replies']} replies were shorter than asked")
    if more["tokens_per_event"] and more["tokens_per_event"] > 1.05:
        found.append(f"  {more['tokens_per_event']:.2f} tokens an event: those of one event count as 0 ms apart")
    if more["client_cpu_us_per_token"]:
        found.append(
            f"  the client used {more['client_cpu_share']:.1%} of a core, "
            f"{more['client_cpu_us_per_token']:.0f} microseconds a token"
        )
    return found


def _scale(more: dict[str, Any]) -> list[str]:
    """What `bench scale` adds."""
    changes = ", ".join(f"{count} from {max(0.0, at):g} s on" for at, count in more["replicas"])
    settled, idle, memory = more["settled_ttft_s"], more["idle_ttft_s"], more["memory_mb"]
    p99 = f"{1e3 * settled['p99']:,.1f}" if settled else "no"
    return [
        f"  p99 of the time to the first token, without the first half minute: {p99} ms; idle {1e3 * idle['p99']:,.1f}",
        f"  replicas: {changes}; memory {memory['before']:,.0f} MB before, {memory['after']:,.0f} after",
    ]


def _times(more: dict[str, Any]) -> list[str]:
    rows = [(label, more[key]) for key, label in TIMES.items() if more.get(key)]
    return [f"  {label:<26}" + "".join(f"{1e3 * row[name]:>10,.1f}" for name in COLUMNS) for label, row in rows]
