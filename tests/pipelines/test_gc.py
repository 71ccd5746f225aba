import time
from pathlib import Path

import pytest

from pipelines.artifacts import LocalStore
from pipelines.gc import OLD_S, garbage
from pipelines.load import load
from pipelines.runner import StageFailed
from tests.pipelines.fakes import FILE, build, steps_of

LATER = OLD_S + 60


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def listed(store: LocalStore, after_s: float = 0.0) -> set[tuple[str, str]]:
    addressed = {s.address for s in steps_of()}
    return {(g.address, g.part.partition("-")[0]) for g in garbage(store, "speedrun", addressed, time.time() + after_s)}


def test_what_is_addressed_stays_and_what_is_not_goes(store: LocalStore) -> None:
    build(store, steps_of())
    assert listed(store, LATER) == set()
    other = steps_of(load(FILE, "laptop", ["chat.epochs=2"]))
    build(store, other)
    gone = {s.address for s in other if s.name in ("chat", "chat_report", "bundle")}
    assert listed(store) == {(address, "") for address in gone}
    for one in garbage(store, "speedrun", {s.address for s in steps_of()}):
        store.remove(one.address, one.part)
    assert listed(store) == set()
    assert all(store.state(s.address) == "built" for s in steps_of())
    assert all(store.state(address) == "missing" for address in gone)


def test_another_pipeline_s_artifacts_are_not_touched(store: LocalStore) -> None:
    other = steps_of(load(FILE, "laptop", ["vocabulary.size=5000"]), "vocabulary")
    build(store, other, pipeline="another")
    assert listed(store, LATER) == set()
    build(store, steps_of(load(FILE, "laptop", ["vocabulary.size=6000"]), "vocabulary"))
    assert len(listed(store, LATER)) == 1


def test_a_try_that_did_not_count_goes_after_a_day(store: LocalStore) -> None:
    (step,) = steps_of(only="vocabulary")
    with pytest.raises(StageFailed):
        build(store, [step], "plug")
    assert listed(store) == set()
    assert listed(store, LATER) == {(step.address, "data"), (step.address, "sums")}  # its work is kept: it may go on
    build(store, [step], "plug")
    assert listed(store) == set()
    assert listed(store, LATER) == {(step.address, "data"), (step.address, "sums"), (step.address, "work")}
    for one in garbage(store, "speedrun", {step.address}, time.time() + LATER):
        store.remove(one.address, one.part)
    store.verify(store.read(step.address))


def test_the_work_of_a_key_that_nobody_addresses_goes_after_a_day(store: LocalStore) -> None:
    (step,) = steps_of(load(FILE, "laptop", ["vocabulary.size=5000"]), "vocabulary")
    with pytest.raises(StageFailed):
        build(store, [step], "plug")
    assert listed(store) == set()
    assert listed(store, LATER) == {(step.address, "")}
