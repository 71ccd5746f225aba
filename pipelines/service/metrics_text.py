"""/metrics: the engines' counters under vLLM's names, so that its Grafana dashboards fit, and the gateway's own.

Source of the names: vLLM 0.11, docs/design/metrics. `engine` numbers the replicas in the order in which they answered;
sum over it. What vLLM does not have begins with `nanochat:`.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.engine.sequence import Finish
from nanochat.engine.stats import Histogram, Stats

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAUGES = {
    "num_requests_running": ("vllm:num_requests_running", "Replies that are being made."),
    "num_requests_waiting": ("vllm:num_requests_waiting", "Replies that wait for room."),
    "kv_cache_usage_perc": ("vllm:kv_cache_usage_perc", "Part of the KV cache that running replies hold, 0 to 1."),
    "kv_tokens": ("nanochat:kv_cache_tokens", "Size of the KV cache in tokens."),
}
COUNTERS = {  # prometheus_client adds _total
    "prefix_cache_queries": ("vllm:prefix_cache_queries", "Prompt tokens that were looked for in the cache."),
    "prefix_cache_hits": ("vllm:prefix_cache_hits", "Prompt tokens that were found there."),
    "num_preemptions": ("vllm:num_preemptions", "Replies that had to give their cache back and start anew."),
    "prompt_tokens": ("vllm:prompt_tokens", "Tokens of prompts, computed or cached."),
    "prompt_tokens_cached": ("vllm:prompt_tokens_cached", "Tokens of prompts that came from the cache."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens of replies."),
    "computed_tokens": ("nanochat:computed_tokens", "Tokens that went through the model, drafts included."),
    "spec_decode_num_draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed ahead."),
    "spec_decode_num_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right."),
}
HISTOGRAMS = {
    "iteration_tokens_total": ("vllm:iteration_tokens_total", "Tokens of a step."),
    "num_sequences": ("nanochat:step_sequences", "Replies of a step."),
    "time_to_first_token_seconds": ("vllm:time_to_first_token_seconds", "From arrival to the first token."),
    "inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", "Between two steps that gave tokens."),
    "request_queue_time_seconds": ("vllm:request_queue_time_seconds", "From arrival to the first step."),
    "request_prefill_time_seconds": ("vllm:request_prefill_time_seconds", "From there to the first token."),
    "request_decode_time_seconds": ("vllm:request_decode_time_seconds", "From there to the last token."),
    "e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds", "From arrival to the end."),
    "request_prompt_tokens": ("vllm:request_prompt_tokens", "Tokens of a prompt."),
    "request_generation_tokens": ("vllm:request_generation_tokens", "Tokens of a reply."),
}
REASONS: dict[Finish, str] = {"stop": "stop", "length": "length", "timeout": "abort", "error": "error"}
LABELS = ["model_name", "engine"]
TURNED_AWAY = ("invalid_api_key", "rate_limit_exceeded", "overloaded")  # codes of 401 and 429


class Counted:
    """Counts the answers of an app by method, route and code."""

    def __init__(self, app: ASGIApp, answers: Counter) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # where the app fails before it says anything

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # a path that is no route may be anything
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self._answers.labels(method, route, str(status)).inc()


def answers_counter(registry: CollectorRegistry) -> Counter:
    """The gateway's answers, under the name and labels that vLLM's own server has for them."""
    return Counter("http_requests", "Answers over HTTP.", ["method", "handler", "status"], registry=registry)


def turned_away_counter(registry: CollectorRegistry) -> Counter:
    """The requests that were turned away unanswered, by the error's code."""
    counter = Counter("nanochat:requests_turned_away", "Requests that got 401 or 429.", ["reason"], registry=registry)
    for reason in TURNED_AWAY:
        counter.labels(reason)  # it is told from the start, so that a rate has something to begin at
    return counter


def exposition(registry: CollectorRegistry, model: str, engines: list[Stats]) -> bytes:
    """The text that Prometheus reads: what the registry holds, then the engines' numbers."""
    own = CollectorRegistry()
    own.register(_Engines(model, engines))
    return generate_latest(registry) + generate_latest(own)


class _Engines(Collector):
    """What the engines say of themselves."""

    def __init__(self, model: str, engines: list[Stats]) -> None:
        self._engines = [([model, str(number)], stats) for number, stats in enumerate(engines)]

    def collect(self) -> Iterator[Metric]:
        for field, (name, said) in GAUGES.items():
            gauge = GaugeMetricFamily(name, said, labels=LABELS)
            for labels, stats in self._engines:
                gauge.add_metric(labels, getattr(stats, field))
            yield gauge
        for field, (name, said) in COUNTERS.items():
            counter = CounterMetricFamily(name, said, labels=LABELS)
            for labels, stats in self._engines:
                counter.add_metric(labels, getattr(stats, field))
            yield counter
        for field, (name, said) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, said, labels=LABELS)
            for labels, stats in self._engines:
                values: Histogram = getattr(stats, field)
                histogram.add_metric(labels, _buckets(values), values.sum)
            yield histogram
        ended = CounterMetricFamily(
            "vllm:request_success", "Replies that ended, by reason.", labels=[*LABELS, "finished_reason"]
        )
        for labels, stats in self._engines:
            for reason, count in stats.request_success.items():
                ended.add_metric([*labels, REASONS[reason]], count)
        yield ended


def _buckets(values: Histogram) -> list[tuple[str, float]]:
    """Prometheus counts all values up to a bound; the engine only those above the bound before."""
    bounds: Iterable[str] = [*(str(bound) for bound in values.bounds), "+Inf"]
    return list(zip(bounds, accumulate(values.counts), strict=True))
