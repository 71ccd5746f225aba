"""What is said of a load, from replies that are made up; and traces, from files that are."""

import gzip
import json
import statistics
from array import array
from pathlib import Path

import numpy as np
import pytest

from pipelines.bench.asked import Asked, Load
from pipelines.bench.outcome import Outcome, Reply, Slo, shares, summary
from pipelines.bench.trace import fit, rate, read_trace, stretch

SLO = Slo(0.5, 0.1)


def reply(due_s: float, times: list[float], tokens: int | None = None, wrong: str | None = None) -> Reply:
    drawn = len(times) if tokens is None else tokens
    end_s = times[-1] if times else due_s
    return Reply(10, drawn, due_s, due_s, end_s, array("d", times), drawn, wrong, "no" if wrong else "")


def outcome(*replies: Reply, window_s: float, closed: bool) -> Outcome:
    return Outcome(replies=replies, window_s=window_s, closed=closed, cpu_s=0.1, wall_s=2.0)


def test_percentiles_are_those_of_another_library() -> None:
    values = np.random.default_rng(0).exponential(size=777)
    found = shares(values)
    cuts = statistics.quantiles(values.tolist(), n=100, method="inclusive")
    assert found is not None
    assert [found["p50"], found["p90"], found["p99"]] == pytest.approx([cuts[49], cuts[89], cuts[98]])
    assert (found["mean"], found["max"]) == pytest.approx((statistics.fmean(values), max(values)))
    assert shares(np.empty(0)) is None


def test_a_closed_loop_counts_what_came_within_its_window() -> None:
    """Two clients for 2 s; one reply goes on to 3 s, with half of its tokens too late."""
    whole = reply(0.0, [0.5, 1.0, 1.5, 2.0])
    cut = reply(1.0, [1.5, 2.0, 2.9, 3.0])
    late = reply(1.9, [2.1, 2.2])
    found = summary([outcome(whole, cut, late, reply(1.0, [], wrong="429"), window_s=2.0, closed=True)], SLO)
    assert found["reply_tokens_per_s"] == (4 + 2) / 2
    assert found["requests_per_s"] == (1 + 0.5) / 2
    assert found["prompt_tokens_per_s"] == 20 / 2
    assert found["in_flight"] == pytest.approx((2 + 1 + 0.1) / 2)
    assert found["between_tokens_s"]["max"] == found["between_tokens_s"]["p50"] == 0.5
    assert (found["requests"], found["errors"], found["said"]) == (4, {"429": 1}, {"429": "no"})
    assert found["latency_s"]["p50"] == 2.0
    assert found["client_cpu_share"] == 0.05
    assert found["client_cpu_us_per_token"] == pytest.approx(1e6 * 0.1 / 10)


def test_tokens_of_one_event_came_at_once() -> None:
    bunched = reply(0.0, [0.1, 0.3, 0.5], tokens=6)  # two tokens an event, 5 gaps
    found = summary([outcome(bunched, window_s=1.0, closed=False)], SLO)
    assert sorted(bunched.between_s(float("inf"))) == pytest.approx([0, 0, 0, 0.2, 0.2])
    assert found["tokens_per_event"] == 2
    assert bunched.per_token_s == pytest.approx(0.4 / 5)
    assert found["reply_tokens_per_s"] == 6


def test_goodput_is_of_those_that_keep_both_promises() -> None:
    good = reply(0.0, [0.5, 0.6])
    late, slow, wrong = reply(0.0, [0.6, 0.7]), reply(0.0, [0.1, 0.3]), reply(0.0, [], wrong="timeout")
    found = summary([outcome(good, late, slow, wrong, window_s=2.0, closed=False)], SLO)
    assert found["requests_per_s"] == 3 / 2
    assert found["goodput_requests_per_s"] == pytest.approx(1 / 2)


def test_runs_are_pooled_by_their_seconds() -> None:
    runs = [
        outcome(reply(0.0, [1.0] * 10), window_s=1.0, closed=True),
        outcome(reply(0.0, [1.0] * 10), window_s=3.0, closed=True),
    ]
    found = summary(runs, SLO)
    assert found["reply_tokens_per_s"] == pytest.approx(20 / 4)
    assert (found["seconds"], found["requests"], found["short_replies"]) == (4.0, 2, 0)


def test_a_run_without_one_reply_says_so() -> None:
    found = summary([outcome(reply(0.0, [], wrong="500"), window_s=1.0, closed=False)], SLO)
    assert (found["ttft_s"], found["client_cpu_us_per_token"], found["errors"]) == (None, None, {"500": 1})


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:17:46.6805900,879,0
"""
MOONCAKE = [
    {"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 700, "output_length": 9, "hash_ids": [0, 4]},
]


def azure(folder: Path) -> Path:
    path = folder / "chat.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    return path


def test_azures_trace(tmp_path: Path) -> None:
    found = read_trace(azure(tmp_path))
    assert [(one.prompt, one.new) for one in found] == [(374, 44), (396, 109), (879, 1)]
    assert [one.at_s for one in found] == pytest.approx([0, 4.314579, 120], abs=1e-5)
    assert len(read_trace(azure(tmp_path), minutes=2)) == 2
    assert rate(found) == pytest.approx(2 / 120)
    assert rate(stretch(found, 0.25)) == pytest.approx(8 / 120)


def test_mooncakes_trace_is_put_in_order_and_keeps_common_beginnings(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE))
    first, second = read_trace(path)
    assert (first, second.at_s) == (Asked(700, 9, 0.0, (0, 4), 512), 2.0)
    halved = fit([first, second], 10_000, 10_000, scale=0.5).asked
    assert [(one.prompt, one.new, one.block) for one in halved] == [(350, 4, 256), (515, 2, 256)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("a,b\n1,2\n", "request 1 cannot be read (KeyError('TIMESTAMP'))"),
        (AZURE + "2023-11-16 18:15:46,many,2\n", "request 4 cannot be read"),
        ('{"timestamp": 0, "input_length": -1, "output_length": 2}', "-1 tokens"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.csv") as caught:
        read_trace(path)
    assert said in str(caught.value)


def test_lengths_are_scaled_until_99_of_100_fit() -> None:
    lengths = np.random.default_rng(0).integers(1, 4000, size=(1000, 2)).tolist()
    asked = [Asked(prompt, new) for prompt, new in lengths]
    found = fit(asked, 512, 511)
    assert max(one.prompt + one.new for one in found.asked) <= 512
    assert found.cut <= 10
    for before, after in zip(asked, found.asked, strict=True):
        if before.prompt + before.new < 7000:
            assert after.prompt == max(1, round(before.prompt * found.scale))
            assert after.new == max(1, round(before.new * found.scale))
    assert sum(one.prompt + one.new > 512 / found.scale for one in asked) <= 10
    assert fit(asked, 100_000, 100_000).scale == 1.0, "what fits is not made longer"
    short = fit(asked, 512, 20)
    assert max(one.new for one in short.asked) == 20
    assert short.cut > 800


def test_a_load_asks_again_from_the_beginning() -> None:
    load = Load(asked=(Asked(1, 8), Asked(2, 6)), clients=4, seconds=3.0)
    assert [load.nth(number).new for number in range(6)] == [2, 3, 6, 6, 8, 6]
    assert (load.more(10**6, 2.9), load.more(0, 3.0)) == (True, False)
    assert [Load(asked=load.asked).nth(number).new for number in (0, 1)] == [8, 6]
