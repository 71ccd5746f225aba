"""Documents and questions that are always there: the standard library of the Python that runs this.

Nothing is downloaded or shipped; the sources are read where Python is installed (PSF licence). What is made differs
from one Python to the next, so `identity` goes into the record of every run, and no result is pinned on it.
"""

import ast
import hashlib
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from nanochat.chat import Message
from pipelines.docstrings import Question, compiled_questions, source_questions, topic_question
from pipelines.documents import SourceError
from pipelines.procedural import procedural_chats

FORM = 1  # raise it when what this module (or docstrings, procedural) makes changes

# Tests, other people's packages, tables, and programs that are no library.
LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "distutils", "encodings", "pydoc_data"}
LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}
SMALLEST = 200  # characters: less is an empty __init__.py or an alias of another module
TABLE = 0.60  # share of letters and space under which text is a table
TABLE_LINES = 20  # an assignment shorter than this is left where it is


def identity() -> str:
    """A stamp of this Python that changes with what it would give; reads no file."""
    told = f"{FORM} {sys.implementation.name} {sys.version} {sys.platform}"
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{sys.implementation.name}-{version}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each module, then of each of pydoc's topics; tables and duplicates are left out."""
    seen: set[str] = set()
    modules = ((name, _without_tables(text, tree)) for name, text, tree in _modules())
    for name, text in chain(modules, ((f"topic/{name}", text) for name, text in _topics())):
        if len(text) >= SMALLEST and _prose(text) >= TABLE and text not in seen:
            seen.add(text)
            yield name, text


def questions() -> Iterator[tuple[str, list[Message]]]:
    """(kind:name, chat of one question and one answer), no question twice.

    True by construction: docstrings and signatures of public names, pydoc's topics, and a few hundred made chats.
    """
    sources = (q for name, _, tree in _modules() for q in source_questions(_dotted(name), tree))
    topics = (topic_question(name, text) for name, text in _topics())
    asked: set[str] = set()
    answered: set[str] = set()
    words: list[str] = []
    for question in chain(sources, compiled_questions(), (q for q in topics if q)):
        # Fifty methods say "Internal function."; one of them is enough.
        if question.ask in asked or question.answer in answered:
            continue
        asked.add(question.ask)
        answered.add(question.answer)
        words.extend(question.answer.split())
        yield question.name, _chat(question)
    for question in procedural_chats(words):
        yield question.name, _chat(question)


def _chat(question: Question) -> list[Message]:
    return [{"role": "user", "content": question.ask}, {"role": "assistant", "content": question.answer}]


def _library() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise SourceError(
            f"python-stdlib: this Python has no library sources at {root} (it is frozen, zipped or embedded); "
            "use --set corpus.source=PATH with text of your own, or an ordinary Python"
        )
    return root


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(path below the library, text, syntax tree) of every module, sorted by path."""
    root = _library()
    for path in sorted(root.rglob("*.py")):
        below = path.relative_to(root)
        folders = below.parts[:-1]
        if LEFT_OUT.intersection(folders) or below.name.startswith("_sysconfigdata") or below.name == "__phello__.py":
            continue
        if any(folder.startswith("config-") for folder in folders):
            continue
        with tokenize.open(path) as file:  # in the encoding that the file declares
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old escape in somebody else's string is not ours to report
            yield below.as_posix(), text, ast.parse(text)


def _topics() -> list[tuple[str, str]]:
    path = _library() / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise SourceError(
            f"python-stdlib: {path} is missing, so this Python is not complete; "
            "install its library, or use --set corpus.source=PATH with text of your own"
        )
    tree = ast.parse(path.read_text("utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(table)
    return sorted(topics.items())


def _without_tables(text: str, tree: ast.Module) -> str:
    """`text` less the long assignments that hold numbers and codes rather than words."""
    lines = text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            first, end = node.lineno - 1, node.end_lineno or node.lineno
            if end - first >= TABLE_LINES and _prose("".join(lines[first:end])) < TABLE:
                del lines[first:end]
    return "".join(lines)


def _prose(text: str) -> float:
    return sum(times for c, times in Counter(text).items() if c.isalpha() or c.isspace()) / len(text)


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
