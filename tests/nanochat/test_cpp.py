"""Compiling: once, kept where no other user can put code, built again when damaged, and plain words when it fails."""

import ctypes
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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


def fake_compiler(folder: Path, then: str) -> Build:
    """A compiler that notes each call in `log` and does `then` with the path of the result in $out."""
    folder.mkdir()
    script = folder / "fake-g++"
    script.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        [ "$1" = --version ] && echo 1.0 && exit 0
        for out; do :; done
        echo $(basename $out) >> {folder}/log
        {then}
        """)
    )
    script.chmod(0o755)
    return Build(folder=folder / "kept", compilers=(str(script),))


@pytest.fixture
def copies(source: Path, tmp_path: Path) -> Build:
    """A compiler that takes its time, and whose result is always `answer`."""
    load(source, [], Build(tmp_path / "real"))
    (built,) = (tmp_path / "real").iterdir()
    return fake_compiler(tmp_path / "fake", f"sleep 0.1; head -c -64 {built} > $out")


def built_by(build: Build) -> list[str]:
    return (build.folder.parent / "log").read_text().split()


def test_it_is_compiled_once_and_again_when_something_changes(source: Path, tmp_path: Path) -> None:
    build = Build(tmp_path / "kept")
    assert load(source, [], build).answer() == 42
    (built,) = build.folder.iterdir()
    assert build.folder.stat().st_mode & 0o777 == 0o700
    when = built.stat().st_mtime_ns
    load(source, [], build)
    assert [path.stat().st_mtime_ns for path in build.folder.iterdir()] == [when]
    source.write_text(CODE.replace("42", "43"))
    assert load(source, [], build).answer() == 43
    header = tmp_path / "more.h"
    header.write_text("")
    load(source, [header], build)
    load(source, [header], replace(build, flags=(*build.flags, "-g")))
    assert len(list(build.folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_library_is_built_anew(source: Path, copies: Build, damage: str) -> None:
    kept = Path(load(source, [], copies)._name)
    assert built_by(copies) == ["part.o", "library.so"]
    whole = kept.read_bytes()
    kept.unlink()  # not written over: this process has it open
    kept.write_bytes({"cut": whole[:5000], "changed": whole.replace(b"answer", b"antwer", 1), "empty": b""}[damage])
    assert load(source, [], copies).answer() == 42
    assert kept.read_bytes() == whole
    assert built_by(copies) == ["part.o", "library.so"] * 2


def test_two_may_build_at_once(source: Path, copies: Build) -> None:
    with ThreadPoolExecutor() as both:
        kept = list(both.map(lambda _: load(source, [], copies)._name, range(2)))
    assert sorted(built_by(copies)) == ["library.so", "library.so", "part.o", "part.o"]
    assert [str(path) for path in copies.folder.iterdir()] == kept[:1]


def test_a_folder_that_others_can_use_is_refused(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(NoCompilerError, match=r"open to others.*chmod 700"):
        load(source, [], Build(tmp_path))
    with pytest.raises(NoCompilerError, match="cannot be made"):
        load(source, [], Build(source / "below"))


def test_what_the_compiler_says_is_told(source: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int 1;")
    with pytest.raises(NoCompilerError, match=r"ended with 1; a compiler for C\+\+20 is needed.*wrong\.cpp:1:5: error"):
        load(wrong, [], Build(tmp_path / "kept"))
    with pytest.raises(NoCompilerError, match=r"none of no-such-g\+\+, no-such is on the PATH; .*apt install g\+\+"):
        load(source, [], Build(tmp_path / "kept", compilers=("no-such-g++", "no-such")))
    with pytest.raises(NoCompilerError, match=r"ended with 3; .*too old"):
        load(source, [], fake_compiler(tmp_path / "old", "echo too old >&2; exit 3"))
    with pytest.raises(NoCompilerError, match="cannot be loaded"):
        load(source, [], fake_compiler(tmp_path / "odd", "echo no library > $out"))


def test_its_threads_are_those_of_torch(source: Path, tmp_path: Path) -> None:
    """torch.set_num_threads is heard, so there is no second pool."""
    source.write_text(THREADS)
    library: ctypes.CDLL = load(source, [], Build(tmp_path / "kept"), openmp=True)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert library.threads() == count
    finally:
        torch.set_num_threads(before)
    assert sum("libgomp" in line and "r-x" in line for line in Path("/proc/self/maps").read_text().splitlines()) == 1
