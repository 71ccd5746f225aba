"""The page shows what the manifests say, and nothing that a model wrote can run in it."""

import json
from pathlib import Path

import pytest

from pipelines.artifacts import LocalStore
from pipelines.load import load
from pipelines.plan import plan
from pipelines.report import report_json, write_report
from pipelines.runner import Job, run
from tests.pipelines.fakes import CLASSES, FILE, options

EVIL = "<script>alert(1)</script>"


def stage(spec: object, job: Job) -> dict[str, float]:
    """A training leaves a curve, an evaluation scores and answers."""
    job.out.put("data.txt", b"data")
    if job.step.spec.makes == "checkpoint":
        rows = [{"step": n, "loss": 8.0 / n, "tokens": 1000 * n, "tokens_per_s": 10.0} for n in range(1, 30)]
        job.out.put("steps.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    if job.step.spec.makes != "report":
        return {}
    answer = {"number": 0, "name": "x", "question": EVIL, "wanted": "yes", "said": EVIL, "right": False}
    job.out.put("answers.jsonl", json.dumps(answer).encode())
    return {"val_bpb": 1.4321, "gzip_bpb": 2.0, "xz_bpb": 1.9, "exact_match": 0.25, "questions": 8}


@pytest.fixture
def built(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    stages = dict.fromkeys(CLASSES, "tests.pipelines.test_report:stage")
    run(plan(load(FILE, "laptop")), store, stages, options(), lambda event: None)
    return store


def test_the_page_has_curves_scores_and_lineage(built: LocalStore, tmp_path: Path) -> None:
    loaded = load(FILE, "laptop")
    page = write_report(loaded, plan(loaded), built, tmp_path / "deep" / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "1.432" in page
    assert all(step.key in page for step in plan(loaded))
    assert EVIL not in page
    assert "&lt;script&gt;" in page


def test_what_is_not_built_is_said(tmp_path: Path) -> None:
    loaded, store = load(FILE, "laptop"), LocalStore(tmp_path / "empty")
    page = write_report(loaded, plan(loaded), store, tmp_path / "page.html").read_text()
    assert page.count("not built") == len(plan(loaded))
    assert report_json(plan(loaded), store) == {"stages": {}}


def test_json_has_key_metrics_made_and_inputs(built: LocalStore) -> None:
    steps = plan(load(FILE, "laptop"))
    stages = report_json(steps, built)["stages"]
    assert list(stages) == [step.name for step in steps]
    assert stages["base_report"]["metrics"]["val_bpb"] == 1.4321
    assert stages["bundle"]["inputs"] == {"model": next(s.address for s in steps if s.name == "chat")}
    assert all(set(s) == {"key", "metrics", "made", "inputs"} for s in stages.values())
