import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import pytest

from pipelines import cli, show
from pipelines.artifacts import LocalStore
from pipelines.documents import SourceFile
from pipelines.lease import Holder
from pipelines.lease import _bytes as lease_bytes
from pipelines.runner import Event, Progress
from tests.pipelines.fakes import FILE, edited, fake_sources, stages, steps_of


class Shell:
    """`nanochat` in this process, with stages that are fakes and a store of its own."""

    def __init__(self, store: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.store = LocalStore(store)
        self.patch = patch
        self.capture = capture
        self.use("good")

    def use(self, name: str) -> None:
        self.patch.setattr(cli, "STAGES", stages(name))

    def __call__(self, verb: str, *words: str, file: Path = FILE) -> tuple[int, str, str]:
        """Exit code, what was printed, and what was said to stderr."""
        code = cli.main([verb, str(file), "--set", f"store={self.store.root}", *words])
        out, err = self.capture.readouterr()
        return code, out, err


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    monkeypatch.setattr(cli, "ray_running", lambda *_: nullcontext())
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    handler = signal.getsignal(signal.SIGTERM)
    yield Shell(tmp_path / "store", monkeypatch, capsys)
    signal.signal(signal.SIGTERM, handler)


PLAN_KEYS = ["name", "kind", "makes", "key", "state", "why", "address", "path", "changes", "estimate"]


def test_plan_shows_states_and_named_changes(shell: Shell) -> None:
    code, out, _ = shell("plan")
    assert code == 0
    assert re.search(r"^base +pretrain +missing +[0-9a-f]{16} +1 x 2 CPU$", out, re.MULTILINE)
    assert shell("run")[0] == 0
    code, out, _ = shell("plan", "--set", "base.optim.matrix_lr=0.03")
    assert re.search(r"^corpus +tokenize +built", out, re.MULTILINE)
    assert re.search(r"^base +pretrain +missing .*\n    changed\n    optim.matrix_lr 0.02 -> 0.03$", out, re.MULTILINE)
    code, out, _ = shell("plan", "--only", "corpus")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["vocabulary", "corpus"]


def test_plan_json_is_stable(shell: Shell) -> None:
    shell("run", "--only", "corpus")
    code, out, _ = shell("plan", "--json")
    said = json.loads(out)
    assert (code, said["pipeline"], said["profile"]) == (0, "speedrun", "laptop")
    assert all(list(step)[: len(PLAN_KEYS)] == PLAN_KEYS for step in said["steps"])
    steps = {s["name"]: s for s in said["steps"]}
    assert steps["base"]["kind"] == "pretrain"
    assert steps["base"]["makes"] == "checkpoint"
    assert (steps["base"]["state"], steps["base"]["path"]) == ("missing", None)
    assert steps["base"]["estimate"]["memory_bytes"] > 10**9
    assert Path(steps["corpus"]["path"], "data.txt").exists()


def test_plan_of_a_cluster_needs_no_credentials_and_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(FILE), "--profile", "h100x16", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert {s["state"] for s in steps} == {"unknown"}
    assert all("still says 's3://YOUR-BUCKET/nanochat'" in s["why"] for s in steps)
    base = next(s for s in steps if s["name"] == "base")
    assert base["place"] == {
        "workers": 16, "cpus": 12, "gpu": "H100", "micro_batch": 16, "retries": 3, "checkpoint_s": 60.0,
        "parallel": "zero1", "nccl": None, "profile": None,
    }  # fmt: skip
    assert cli.main(["plan", str(FILE), "--profile", "h100x16"]) == 0
    assert "16 x 12 CPU + H100" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["run", "status", "serve", "report", "gc"])
def test_what_needs_the_store_says_what_to_write(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, str(FILE), "--profile", "h100x16"]) == 2
    assert "write your own there, or give --set store=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("profile", ["laptop", "h100x16"])
def test_plan_is_quick_and_imports_neither_torch_nor_ray(profile: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.cli import main\n"
        f"code = main(['plan', {str(FILE)!r}, '--profile', {profile!r}])\n"
        "assert not {'torch', 'ray', 'boto3', 'matplotlib'} & set(sys.modules)\n"
        "raise SystemExit(code)"
    )
    start = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, cwd=FILE.parents[1], capture_output=True
    )
    end = os.times()
    assert done.returncode == 0, done.stderr
    # Of the processor, not of the clock: the machine may be busy with other tests.
    assert (end.children_user + end.children_system) - (start.children_user + start.children_system) < 1.0


def test_s3_that_cannot_be_reached_is_unknown_soon(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    start = time.process_time()
    code, out, _ = shell("plan", "--set", "store=s3://b/p", "--json")
    steps = json.loads(out)["steps"]
    assert code == 0
    assert {s["state"] for s in steps} == {"unknown"}
    assert all("the store s3://b/p cannot be used: Could not connect" in s["why"] for s in steps)
    assert time.process_time() - start < 2
    code, _, err = shell("run", "--set", "store=s3://b/p")
    assert code == 4
    assert "the store s3://b/p cannot be used" in err


def test_run_builds_and_then_builds_nothing(shell: Shell) -> None:
    code, out, _ = shell("run", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(line["stage"], line["event"]) for line in lines][-1] == ("bundle", "made")
    assert set(lines[0]) == {"stage", "event", "key", "address", "metrics", "made"}
    assert {"commit", "dirty", "host", "torch", "ray", "seconds", "started"} <= set(lines[0]["made"])
    code, out, _ = shell("run", "--json")
    assert {json.loads(line)["event"] for line in out.splitlines()} == {"built"}
    code, out, _ = shell("run", "--json", "--rebuild", "base")
    assert [json.loads(x)["stage"] for x in out.splitlines() if json.loads(x)["event"] == "made"] == ["base"]


def test_what_is_wrong_exits_2(shell: Shell, tmp_path: Path) -> None:
    path = edited(tmp_path, ("    start: base", "    start: bsae"))
    line = path.read_text().splitlines().index("    start: bsae") + 1
    code, _, err = shell("plan", file=path)
    assert (code, err) == (2, f"{path}:{line}: stages.chat.start: no stage 'bsae'; did you mean 'base'?\n")
    assert shell("run", "--rebuild", "bsae")[0] == 2
    assert shell("run", "--only", "bsae")[0] == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan"])
    assert caught.value.code == 2


def test_a_failed_stage_exits_1_and_says_that_its_work_is_kept(shell: Shell) -> None:
    shell.use("plug")
    code, _, err = shell("run", "--only", "vocabulary")
    assert code == 1
    assert err == (
        "stage vocabulary failed: RuntimeError: somebody pulled the plug\n"
        "what it had done is kept; run the same again to go on from there\n"
    )
    code, out, _ = shell("status", "--only", "vocabulary", "--json")
    assert json.loads(out)["steps"][0]["state"] == "partial"


def test_ctrl_c_exits_130_with_one_sentence(shell: Shell) -> None:
    shell.use("interrupted")
    code, _, err = shell("run", "--only", "vocabulary")
    assert (code, err) == (130, "interrupted; the same command goes on from here\n")


def test_a_store_that_cannot_be_written_exits_4(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = shell("run", "--set", f"store={tmp_path / 'file'}")
    assert code == 4
    assert err.count("\n") == 1
    assert "is a file" in err
    shell.use("full")
    assert shell("run")[0] == 4


def test_a_changed_source_exits_5(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SourceFile("a.txt", 1, "1")]
    fake_sources(monkeypatch, files)
    shell.use("reads")
    assert shell("run")[0] == 0
    files[0] = SourceFile("a.txt", 2, "2")
    for verb in ("plan", "run"):
        code, _, err = shell(verb)
        assert code == 5
        assert "a.txt changed (1 bytes then, 2 now)" in err
        assert "--set vocabulary.revision=1" in err


def test_no_room_exits_3(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "free_memory", lambda: 1 << 30)
    for verb in ("plan", "run"):
        code, _, err = shell(verb)
        assert code == 3
        assert "of memory, but 1.0 GiB can be had here" in err
    monkeypatch.setattr(cli, "free_memory", lambda: None)
    assert shell("run")[0] == 0
    monkeypatch.setattr(cli, "free_memory", lambda: 1 << 30)
    assert shell("plan")[0] == 0  # what is built needs no room


def test_a_damaged_artifact_exits_1_with_the_command_that_mends_it(shell: Shell) -> None:
    assert shell("run")[0] == 0
    step = steps_of()[0]
    Path(shell.store.data(step.address).uri("data.txt")).unlink()
    code, _, err = shell("run")
    assert code == 1
    assert err.endswith(f"data.txt is gone; rebuild it: nanochat run {FILE} --profile laptop --rebuild vocabulary\n")
    assert shell("run", "--rebuild", "vocabulary")[0] == 0


def test_a_stage_that_another_run_builds_exits_1(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.lease.BEAT_S", 0.05)
    work = shell.store.dir(steps_of()[0].address, "work")
    progress = {"done": 3, "total": 10, "unit": "step", "numbers": {"train_loss": 2.25}}

    def beat(number: int) -> None:
        me = Holder(
            pipeline="speedrun", stage="vocabulary", host="elsewhere", pid=1, number=1, progress=progress, beat=number
        )
        work.put(".lease-00000001.json", lease_bytes(me))

    beat(0)
    code, out, _ = shell("status")
    assert re.search(r"^vocabulary +running +step 3 of 10, train_loss 2.25 on elsewhere:1$", out, re.MULTILINE)
    beats = iter(range(1, 1000))
    monkeypatch.setattr("pipelines.lease.time.sleep", lambda _: beat(next(beats)))
    code, _, err = shell("run")
    assert code == 1
    assert "stage vocabulary is being built by elsewhere:1, 3 of 10 steps done; wait for it with --wait" in err


def test_gc_lists_and_deletes_only_with_yes(shell: Shell) -> None:
    assert shell("gc")[1] == "nothing to delete\n"
    shell("run")
    shell("run", "--only", "chat", "--set", "chat.epochs=2")
    code, out, _ = shell("gc")
    assert code == 0
    assert re.match(r"checkpoint/chat-[0-9a-f]{16}  0.0 MB  no profile of this file addresses it\n", out)
    assert "could be freed; delete with --yes" in out
    assert len(shell.store.addresses("checkpoint")) == 3
    assert "freed" in shell("gc", "--yes")[1]
    assert len(shell.store.addresses("checkpoint")) == 2
    assert shell("gc")[1] == "nothing to delete\n"


def test_status_of_what_is_built_shows_its_numbers(shell: Shell) -> None:
    shell("run")
    steps = json.loads(shell("status", "--json")[1])["steps"]
    assert {s["state"] for s in steps} == {"built"}
    assert steps[0]["metrics"] == {"train_steps": 1.0}
    assert "train_steps 1" in shell("status")[1]


def events() -> list[Event]:
    step = steps_of(only="base")[-1]
    numbers = {"train_loss": 3.21, "tokens_per_s": 12_345.6}
    return [
        Event(step, "started"),
        *(
            Event(step, "progress", progress=Progress(done=n, total=40, unit="step", numbers=numbers))
            for n in (10, 20, 30)
        ),
        Event(step, "waiting", text="waits"),
    ]


def test_plain_lines_say_step_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 103.0, 111.0, 112.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(clock))
    stream = StringIO()
    lines = show.PlainLines(stream, every_s=5)
    for event in events():
        lines(event)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "base: begins",
        "base: step 10 of 40, train_loss 3.21, tokens_per_s 12,346",
        "base: step 30 of 40, train_loss 3.21, tokens_per_s 12,346, 5 s left",
        "base: waits",
    ]


def test_bars_leave_lines_behind() -> None:
    stream = StringIO()
    bars = show.Bars(stream)
    for event in events():
        bars(event)
    bars.close()
    assert "base         waits" in stream.getvalue()


def test_a_closed_pipe_is_no_trace(tmp_path: Path) -> None:
    line = f"{sys.executable} -m pipelines.cli plan {FILE} | true"
    done = subprocess.run(
        ["bash", "-c", line], cwd=FILE.parents[1], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True
    )
    assert done.stderr == b""
