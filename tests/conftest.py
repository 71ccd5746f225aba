"""What tests of several folders share: one whole life, built once."""

import signal
import subprocess
import time
from typing import Any

import pytest

from tests.commands import ROOT, environment, left_over


@pytest.fixture(scope="session", autouse=True)
def _programs_hear_ctrl_c() -> None:
    """Programs of the tests inherit whether SIGINT is ignored, and a shell makes what it runs with `&` ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A home in which `make quickstart ONCE=1` ran in a fresh clone, installation included, and what it printed."""
    home = tmp_path_factory.mktemp("life")
    clone = home / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    began = time.monotonic()
    done = subprocess.run(
        ["make", "quickstart", "ONCE=1"],
        cwd=clone,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    seconds = time.monotonic() - began
    print(done.stdout, done.stderr, f"quickstart took {seconds:.0f} s", sep="\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert left_over(home) == []
    return {"home": home, "clone": clone, "said": done.stdout, "errors": done.stderr, "seconds": seconds}
