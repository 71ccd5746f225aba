"""Compiling: once, kept where no other user can put code, built again when damaged, and plain words when it fails."""

import ctypes
from pathlib import Path

import pytest
import torch

from nanochat.cpp import Build, NoCompilerError, load

CODE = 'extern "C" int answer() { return 42; }\n'
THREADS = """
#include <omp.h>
extern "C" int threads() { int most = 0;
#pragma omp parallel
#pragma omp single
most = omp_get_num_threads();
return most; }
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(CODE)
    return path


def test_it_is_compiled_once_and_again_when_the_source_changes(source: Path, tmp_path: Path) -> None:
    build = Build(tmp_path / "kept")
    assert load(source, [], build).answer() == 42
    (built,) = build.folder.iterdir()
    assert build.folder.stat().st_mode & 0o077 == 0
    when = built.stat().st_mtime_ns
    load(source, [], build)
    assert [path.stat().st_mtime_ns for path in build.folder.iterdir()] == [when]
    source.write_text(CODE.replace("42", "43"))
    assert load(source, [], build).answer() == 43
    header = tmp_path / "more.h"
    header.write_text("")
    load(source, [header], build)
    assert len(list(build.folder.iterdir())) == 3


def test_a_damaged_library_is_built_again(source: Path, tmp_path: Path) -> None:
    build = Build(tmp_path / "kept")
    load(source, [], build)
    (built,) = build.folder.iterdir()
    copy = tmp_path / "other"
    copy.mkdir(mode=0o700)
    data = bytearray(built.read_bytes())
    data[len(data) // 2] ^= 1
    (copy / built.name).write_bytes(data)  # elsewhere: the first one is in this process's memory
    assert load(source, [], Build(copy)).answer() == 42
    assert (copy / built.name).read_bytes() == built.read_bytes()


def test_a_folder_that_others_can_write_to_is_refused(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(NoCompilerError, match=r"open to others.*chmod 700"):
        load(source, [], Build(tmp_path))


def test_what_the_compiler_says_is_told(source: Path, tmp_path: Path) -> None:
    source.write_text("int 1;")
    with pytest.raises(NoCompilerError, match=r"ended with 1; g\+\+ 11 or newer is needed.*answer\.cpp:1:5: error"):
        load(source, [], Build(tmp_path / "kept"))
    with pytest.raises(NoCompilerError, match="none of no-such-compiler is on the PATH"):
        load(source, [], Build(tmp_path / "kept", compilers=("no-such-compiler",)))


def test_its_threads_are_those_of_torch(source: Path, tmp_path: Path) -> None:
    """torch.set_num_threads is heard, so there is no second pool."""
    source.write_text(THREADS)
    library: ctypes.CDLL = load(source, [], Build(tmp_path / "kept"))
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert library.threads() == count
    finally:
        torch.set_num_threads(before)
    assert sum("libgomp" in line and "r-x" in line for line in Path("/proc/self/maps").read_text().splitlines()) == 1
