"""What linters cannot say about the house: sizes of files, generated files that are current, who imports what."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.schema import SCHEMA, schema_text

ROOT = Path(__file__).parent.parent
PACKAGES = ("nanochat", "pipelines", "cluster")
MOST_LINES = 400


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_can_be_read_in_one_go(package: str) -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in ROOT.joinpath(package).rglob("*.py")}
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


def test_the_schema_is_current() -> None:
    assert SCHEMA.read_text() == schema_text(), "write it anew: python -m pipelines.schema"


def test_nanochat_can_be_imported_on_a_bare_gpu_machine() -> None:
    """With torch, numpy and safetensors alone; what reads or trains imports its own inside the function."""
    code = """
import importlib, pkgutil, sys
class Bare:
    blocked = set("boto3 fastapi httpx huggingface_hub matplotlib pyarrow pydantic ray rich rustbpe scipy tiktoken "
                  "tokenizers transformers yaml pipelines cluster".split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} is not on a bare machine", name=name)
sys.meta_path.insert(0, Bare())
import nanochat
for module in pkgutil.walk_packages(nanochat.__path__, "nanochat."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # comes with torch for CUDA, and is asked for there alone
        if (module.name, error.name) != ("nanochat.engine.paged", "triton"):
            raise
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr
