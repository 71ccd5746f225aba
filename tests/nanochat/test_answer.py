"""Answers for scores are those of slow generation, whatever is answered beside them."""

from nanochat.engine.sampler import SampleParams
from nanochat.eval.answer import greedy_answers
from tests.nanochat.sizes import filled, small, some_tokens
from tests.reference.generate import generate


def test_answers_are_those_of_slow_generation_without_the_stop_token() -> None:
    model = filled(small())
    prompts = [
        some_tokens(1, length, seed)[0].tolist() for seed, length in enumerate((3, 9, 20, 1, 7, 4, 30, 2, 11, 5))
    ]
    params = SampleParams(max_tokens=12, temperature=0.0)
    alone = [generate(model, prompt, params) for prompt in prompts]
    stop = alone[0][4]
    wanted = [a[: a.index(stop)] if stop in a else a for a in alone]
    assert greedy_answers(model, prompts, 12, stop) == wanted
    assert greedy_answers(model, [], 12, stop) == []
