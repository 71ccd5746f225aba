"""README.md tells the truth: its commands run, its pipeline file loads, its map is the house."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.load import load
from tests.commands import ROOT, environment

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(
    r"(<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<kind>bash|python|yaml)\n(?P<code>.*?)```", re.DOTALL
)
BLOCKS = list(BLOCK.finditer(README))
# The fixture `life` has run the one; the other runs this file.
ELSEWHERE = {"make quickstart\n", "make test\n"}


def run_here(kind: str) -> list[Any]:
    return [m["code"] for m in BLOCKS if m["kind"] == kind and not m["reason"] and m["code"] not in ELSEWHERE]


def test_blocks_that_are_not_run_say_why() -> None:
    assert all(len(m["reason"]) > 10 for m in BLOCKS if m["reason"])
    assert {code for code in ELSEWHERE if f"```bash\n{code}" in README} == ELSEWHERE


@pytest.mark.life
@pytest.mark.ray
@pytest.mark.parametrize(
    "command",
    [["bash", "-euc", code] for code in run_here("bash")] + [["python", "-c", code] for code in run_here("python")],
)
def test_a_block_runs(life: dict[str, Any], command: list[str]) -> None:
    done = subprocess.run(
        command, cwd=life["clone"], env=environment(life["home"]), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code", run_here("yaml"))
def test_a_pipeline_file_loads(code: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(code)
    assert load(path, "laptop").pipeline.stages


def test_the_map_names_every_module_and_no_other() -> None:
    block = README.split("## The map of the house")[1].split("```")[1]
    named: set[str] = set()
    folder = ""
    for line in block.splitlines():
        head = line.split("  ")[0].strip() if not line.startswith(" ") else ""
        if head.endswith("/"):
            folder = head
        named |= {folder + word for word in re.findall(r"[\w/]+\.py", line)}
    there = {
        str(path.relative_to(ROOT))
        for package in ("nanochat", "pipelines", "cluster")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" or path.stat().st_size
    }
    assert named == there


def test_pictures_and_links_are_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert not missing
