"""/metrics is what Prometheus reads, under vLLM's names, with the engine's numbers."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nanochat.engine.engine import Engine
from nanochat.engine.stats import Histogram, Stats
from pipelines.service import metrics_text
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.serving import CARD, ByteVocabulary, Scripted, running, tiny_runner

# As vLLM's own Grafana dashboard (examples/online_serving/dashboards/grafana/performance_statistics) asks for them.
DASHBOARD = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
)


@pytest.fixture
def served() -> Iterator[tuple[str, Worker]]:
    worker = Worker(Engine(tiny_runner(), max_batch=2))
    with running(make_app(worker, ByteVocabulary(), CARD)) as url:
        yield url, worker
    worker.close()


def scraped(url: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by name and labels."""
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    families: list[Metric] = list(text_string_to_metric_families(answer.text))
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_an_engines_work_is_told_under_vllms_names(served: tuple[str, Worker]) -> None:
    url, worker = served
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}), ("completions", {})):
        asked: dict[str, Any] = {"model": CARD.id, "seed": 1, "max_tokens": 9, **body}
        asked |= {} if body else {"prompt": "Hi", "n": 2}
        assert httpx.post(f"{url}/v1/{path}", json=asked).status_code == 200
    found, stats = scraped(url), worker.load()
    engine = (("engine", "0"), ("model_name", CARD.id))
    assert found.keys() >= set(DASHBOARD)
    assert found["vllm:prompt_tokens_total"][engine] == stats.prompt_tokens == 6 + 2 * 3
    assert found["vllm:generation_tokens_total"][engine] == stats.generation_tokens > 3
    assert found["vllm:num_requests_running"][engine] == 0
    assert found["vllm:time_to_first_token_seconds_count"][engine] == 3
    assert found["vllm:request_generation_tokens_sum"][engine] == stats.generation_tokens
    buckets = found["vllm:request_prompt_tokens_bucket"]
    assert buckets[(*engine[:1], ("le", "4.0"), *engine[1:])] == 2, "two prompts of 3 tokens"
    assert buckets[(*engine[:1], ("le", "8.0"), *engine[1:])] == 3, "and one of 6"
    assert buckets[(*engine[:1], ("le", "+Inf"), *engine[1:])] == 3
    assert sum(found["vllm:request_success_total"].values()) == 3


def test_every_number_of_the_engine_is_told() -> None:
    told = {*metrics_text.GAUGES, *metrics_text.COUNTERS, *metrics_text.HISTOGRAMS, "request_success"}
    assert told == {field.name for field in fields(Stats)}
    assert {field.name for field in fields(Stats) if field.type is Histogram} == set(metrics_text.HISTOGRAMS)


def test_several_engines_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Engine(tiny_runner()))
    backend = Scripted("a")

    async def both() -> list[Stats]:
        return [worker.load(), worker.load()]

    monkeypatch.setattr(backend, "stats", both)
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        found = scraped(url)
    assert [dict(labels)["engine"] for labels in found["vllm:num_requests_running"]] == ["0", "1"]
    worker.close()


def test_answers_are_counted_by_code(served: tuple[str, Worker]) -> None:
    url, _ = served
    for _ in range(3):
        httpx.get(f"{url}/v1/models/other")
    httpx.get(f"{url}/v1/models")
    httpx.get(f"{url}/{'x' * 50}")
    httpx.post(f"{url}/v1/completions", content=b"{")
    httpx.request("PATCH", f"{url}/health")
    counted = {
        tuple(value for _, value in labels): count for labels, count in scraped(url)["http_requests_total"].items()
    }
    assert counted == {
        ("/v1/models/{name:path}", "GET", "404"): 3,
        ("/v1/models", "GET", "200"): 1,
        ("other", "GET", "404"): 1,
        ("/v1/completions", "POST", "400"): 1,
        ("/health", "other", "405"): 1,
    }
