import ast
import re
from pathlib import Path

from pipelines.metrics import METRICS, UNITS

PIPELINES = Path(__file__).parents[2] / "pipelines"


def test_names_are_unique_snake_case_and_have_a_unit_and_a_meaning() -> None:
    assert len(UNITS) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.unit
        assert len(metric.meaning) > 10


def test_every_metric_is_returned_by_some_stage() -> None:
    """A metric that no stage knows is a dead one; the runner refuses those that are not listed."""
    words = {
        node.value
        for path in (*PIPELINES.glob("stages/*.py"), PIPELINES / "curves.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(UNITS) <= words
