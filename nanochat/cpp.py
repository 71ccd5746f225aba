"""C++ that is compiled on the machine it runs on, and kept in the user's own folder.

Compiling takes seconds, once for each machine and version of the sources.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
DIGEST = 64  # characters at a library's end: SHA-256 of what is before them


class NoCompilerError(RuntimeError):
    """Nothing can be built, kept or loaded on this machine; the message says why and what helps."""


@dataclass(frozen=True, slots=True)
class Build:
    """Where the library is kept, and how it is compiled.

    folder: made if missing; must be the user's own and closed to others, since what lies there is run.
    compilers: names or paths, the first that exists is taken.
    """

    folder: Path = Path("~/.cache/nanochat/native")
    compilers: tuple[str, ...] = COMPILERS
    flags: tuple[str, ...] = FLAGS


def load(source: Path, headers: Sequence[Path], build: Build, *, openmp: bool = False) -> ctypes.CDLL:
    """The library made of `source`: from the folder if it lies there whole, else built and put there.

    headers: whatever else the result depends on.  openmp: its loops run on the threads of torch; a second pool of
    threads beside them would fight for the cores. Needs g++: clang++ calls another OpenMP than the one that torch
    brings.  Raises NoCompilerError.
    """
    folder = _own_folder(build.folder.expanduser())
    compiler = next((found for name in build.compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoCompilerError(
            f"no C++ compiler: none of {', '.join(build.compilers)} is on the PATH; install one (apt install g++)"
        )
    flags = build.flags
    if openmp:
        _share_openmp()
        flags = (*flags, "-fopenmp")
    path = folder / f"{_key(compiler, flags, [source, *headers])}.so"
    if not _whole(path):
        _compile(compiler, flags, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompilerError(f"{source.name} compiled by {compiler} cannot be loaded: {error}") from error


def _share_openmp() -> None:
    """Make the OpenMP that torch has loaded known to libraries that are loaded later."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = {line.split()[-1] for line in lines if "libgomp" in line}
    if len(found) != 1:
        raise NoCompilerError(f"torch should have loaded one libgomp, whose threads are used; found {sorted(found)}")
    ctypes.CDLL(found.pop(), mode=ctypes.RTLD_GLOBAL)


def _own_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise NoCompilerError(f"the folder of compiled code {folder} cannot be made: {error}; name another") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise NoCompilerError(
            f"the folder of compiled code {folder} is open to others or belongs to user {state.st_uid}; what lies "
            f"there is run, so make it yours alone (chmod 700) or name another"
        )
    return folder


def _key(compiler: str, flags: tuple[str, ...], sources: Sequence[Path]) -> str:
    """Names everything that the compiled code depends on."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name} {source.stat().st_size}\n".encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update("\n".join((compiler, version, *flags, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Model and abilities, since the code is compiled for just this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _whole(path: Path) -> bool:
    """Whether the library is as it was written: a damaged one would end the process when it is loaded or run."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return data[-DIGEST:] == hashlib.sha256(data[:-DIGEST]).hexdigest().encode()


def _compile(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> None:
    """Builds beside `path` and moves it there whole: two processes that do so at once do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, built = Path(folder) / "part.o", Path(folder) / "library.so"
        _run([compiler, *flags, "-Wno-psabi", "-c", str(source), "-o", str(part)], part)
        # With -fopenmp, linking would add the compiler's own OpenMP.
        _run([compiler, *(flag for flag in flags if flag != "-fopenmp"), str(part), "-o", str(built)], built)
        data = built.read_bytes()
        built.write_bytes(data + hashlib.sha256(data).hexdigest().encode())
        built.replace(path)


def _run(command: list[str], makes: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not makes.exists():
        raise NoCompilerError(
            f"`{' '.join(command)}` ended with {done.returncode}; a compiler for C++20 is needed "
            f"(g++ 11 or clang++ 14 or newer). It said: {done.stderr.strip()[-2000:]}"
        )
