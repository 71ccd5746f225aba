import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.artifacts import BrokenArtifactError, LocalStore, Store, StoreError
from pipelines.documents import SourceError, SourceFile
from pipelines.lease import StageHeld, holder
from pipelines.load import load
from pipelines.runner import SourceChanged, StageFailed, causes
from tests.pipelines.fakes import FILE, build, edited, fake_sources, steps_of, words


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_second_run_builds_nothing_and_a_change_rebuilds_only_what_follows(either_store: Store, tmp_path: Path) -> None:
    store = either_store
    entered: list[str] = []

    def around() -> AbstractContextManager[None]:
        entered.append("Ray")
        return nullcontext()

    assert all(w.endswith(" made") for w in words(build(store, steps_of(), around=around)))
    assert entered.pop() == "Ray"  # one for all stages
    again = build(store, steps_of(), around=around)
    assert len(again) == 8
    assert all(w.endswith(" built") for w in words(again))
    assert entered == []  # no Ray where nothing is made
    changed = load(edited(tmp_path, ("chat.epochs: 1.2", "chat.epochs: 2")), "laptop")
    made = [w for w in words(build(store, steps_of(changed))) if w.endswith(" made")]
    assert made == ["chat made", "chat_report made", "bundle made"]


def test_a_manifest_says_what_was_made_from_what(store: LocalStore) -> None:
    steps = {s.name: s for s in steps_of()}
    build(store, list(steps.values()), made={"commit": "abc", "dirty": False})
    chat = store.read(steps["chat"].address)
    assert chat.inputs == {"start": steps["base"].address, "data": steps["dialogues"].address}
    assert chat.recipe == steps["chat"].recipe
    assert [f.path for f in chat.files] == ["data.txt", "inner/more.txt"]
    assert (chat.kind, chat.makes, chat.key) == ("sft", "checkpoint", steps["chat"].key)
    assert (chat.pipeline, chat.profile, chat.metrics) == ("speedrun", "laptop", {"train_steps": 1.0})
    assert chat.made["commit"] == "abc"
    assert chat.made["place"]["workers"] == 1
    assert chat.made["seconds"] >= 0
    assert len(chat.code) == 16
    store.verify(chat)


def test_the_seed_reaches_only_the_stages_that_draw(store: LocalStore) -> None:
    steps = steps_of()
    build(store, steps)
    for step in steps:
        with store.data(step.address).open("data.txt") as file:
            assert file.read().endswith(b" 7" if step.spec.draws else b" 0")


def test_a_stage_that_fails_leaves_its_work_and_no_artifact(store: LocalStore) -> None:
    steps = steps_of(only="corpus")[:1]
    with pytest.raises(StageFailed, match=r"stage vocabulary failed: RuntimeError: somebody pulled the plug"):
        build(store, steps, "plug")
    assert store.state(steps[0].address) == "partial"
    held = holder(store.dir(steps[0].address, "work"))
    assert held is not None
    assert held.released
    build(store, steps, "plug")
    assert store.state(steps[0].address) == "built"
    assert len([p for p in store.folders(steps[0].address) if p.startswith("data-")]) == 2


def test_what_ray_wraps_around_a_full_disk_is_taken_off(store: LocalStore) -> None:
    with pytest.raises(StoreError, match=r"^the store is full$"):
        build(store, steps_of(only="vocabulary"), "full")


def test_an_error_of_a_ray_task_is_said_as_it_was_raised(store: LocalStore) -> None:
    """Ray raises a double: of the class that was raised, and with a whole trace as its text."""
    with pytest.raises(StageFailed, match=r"^stage vocabulary failed: the holdout is empty$"):
        build(store, steps_of(only="vocabulary"), "doubled")


def test_a_source_file_that_changes_under_a_stage_is_a_changed_source(store: LocalStore) -> None:
    with pytest.raises(SourceChanged, match=r"stage vocabulary: /data/x changed"):
        build(store, steps_of(only="vocabulary"), "moved")


def test_causes_go_through_what_ray_wraps() -> None:
    inner, outer = ValueError("inner"), RuntimeError("outer")
    outer.worker_failures = {0: inner}  # type: ignore[attr-defined]
    inner.__cause__ = outer  # a circle ends
    assert list(causes(outer)) == [outer, inner]


def test_ctrl_c_leaves_a_state_from_which_the_same_run_goes_on(store: LocalStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(store, steps_of(only="vocabulary"), "interrupted")
    assert words(build(store, steps_of(only="vocabulary"))) == ["vocabulary made"]


def test_a_run_whose_stage_was_taken_over_ends(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could go on, and make the same; but its checkpoints would be pruned by two."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    [step] = steps_of(only="vocabulary")
    with pytest.raises(StageHeld, match="stage vocabulary was taken over by another run"):
        build(store, [step], "overtaken")
    assert holder(store.dir(step.address, "work")).host == "elsewhere"  # type: ignore[union-attr]
    assert store.state(step.address) != "built"


@pytest.mark.parametrize(("stage", "said"), [("unlisted", "los"), ("infinite", "not finite"), ("nothing", "nothing")])
def test_a_stage_that_does_not_keep_its_word_makes_nothing(store: LocalStore, stage: str, said: str) -> None:
    with pytest.raises(StageFailed, match=said):
        build(store, steps_of(only="vocabulary"), stage)
    assert store.state(steps_of(only="vocabulary")[0].address) != "built"


def test_a_file_that_no_dir_wrote_is_not_committed(store: LocalStore) -> None:
    with pytest.raises(StageFailed, match=r"stray.txt was not written by Dir.put"):
        build(store, steps_of(only="vocabulary"), "behind")


def test_the_first_to_commit_wins_and_the_other_takes_its_result(store: LocalStore) -> None:
    (step,) = steps_of(only="vocabulary")
    build(store, [step], "rival")
    with store.data(step.address).open("data.txt") as file:
        assert file.read() == b"the other's"


def test_a_damaged_input_stops_the_stage_that_would_read_it(store: LocalStore) -> None:
    steps = steps_of(only="corpus")
    build(store, steps[:1])
    path = Path(store.data(steps[0].address).uri("data.txt"))
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BrokenArtifactError, match=r"--rebuild vocabulary"):
        build(store, steps)
    assert words(build(store, steps, rebuild=frozenset({"vocabulary"}))) == ["vocabulary made", "corpus made"]
    path.unlink(missing_ok=True)
    Path(store.data(steps[0].address).uri("data.txt")).unlink()
    with pytest.raises(BrokenArtifactError, match=r"data.txt is gone; rebuild it"):
        build(store, steps)  # a built stage whose files are gone is seen by their sizes


def test_rebuild_begins_from_nothing(store: LocalStore) -> None:
    steps = steps_of(only="vocabulary")
    with pytest.raises(StageFailed):
        build(store, steps, "plug")
    with pytest.raises(StageFailed):  # the work that would let it go on is gone
        build(store, steps, "plug", rebuild=frozenset({"vocabulary"}))
    build(store, steps, "plug")
    with pytest.raises(StageFailed):
        build(store, steps, "plug", rebuild=frozenset({"vocabulary"}))
    assert store.state(steps[0].address) == "partial"


def test_a_source_that_changed_stops_the_run_and_is_named(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SourceFile("a.parquet", 10, "1"), SourceFile("b.parquet", 20, "1")]
    fake_sources(monkeypatch, files)
    steps = steps_of(only="corpus")
    build(store, steps, "reads")
    assert store.read(steps[0].address).sources == {"source": [asdict(f) for f in files]}
    assert all(w.endswith("built") for w in words(build(store, steps, "reads")))
    files[1] = SourceFile("b.parquet", 21, "2")
    with pytest.raises(
        SourceChanged, match=r"vocabulary: b.parquet changed \(20 bytes then, 21 now\) since .*revision"
    ):
        build(store, steps, "reads")
    files[1] = SourceFile("c.parquet", 20, "1")
    with pytest.raises(SourceChanged, match=r"b.parquet is gone"):
        build(store, steps, "reads")
    revised = load(FILE, "laptop", ["vocabulary.revision=1", "corpus.revision=1"])
    assert words(build(store, steps_of(revised, "corpus"), "reads")) == ["vocabulary made", "corpus made"]


def test_a_source_that_cannot_be_read_is_said_in_its_own_words(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sources(monkeypatch, [])

    def refuse(source: str, base: Path) -> None:
        raise SourceError("/data/x.parquet: no such file")

    monkeypatch.setattr("pipelines.sources.listing", refuse)
    with pytest.raises(StageFailed, match=r"^stage vocabulary failed: /data/x.parquet: no such file$"):
        build(store, steps_of(only="vocabulary"), "reads")


def test_progress_reaches_the_caller_and_the_lease(store: LocalStore) -> None:
    said = build(store, steps_of(only="vocabulary"))
    assert [e.what for e in said] == ["started", "progress", "made"]
    assert said[1].progress is not None
    assert said[1].progress.numbers == {"train_loss": 2.5}
    held = holder(store.dir(said[0].step.address, "work"))
    assert held is not None
    assert json.loads(json.dumps(held.progress))["done"] == 1
