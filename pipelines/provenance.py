"""Who made it: versions, the commit, and a digest of the code. Recorded, shown, and part of no key."""

import hashlib
import platform
import socket
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "tiktoken")


def made_by() -> dict[str, Any]:
    """The commit (None where this is no git clone), whether files differ from it, the host and the versions."""
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain")),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def code_digest(target: str) -> str:
    """sha256 over the module of a stage's function ("module:function") and all of nanochat; imports neither."""
    module = find_spec(target.partition(":")[0])
    if module is None or module.origin is None:
        raise ModuleNotFoundError(f"no module for the stage function {target}")
    digest = hashlib.sha256(Path(module.origin).read_bytes())
    for path in sorted(ROOT.joinpath("nanochat").rglob("*.py")):
        digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
