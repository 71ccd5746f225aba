"""The documents and questions that every Python brings along."""

import ast
import hashlib
import inspect
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from nanochat.chat import check_messages
from pipelines import stdlib
from pipelines.docstrings import first_paragraph, source_questions
from pipelines.documents import SourceError


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return list(stdlib.documents())


@pytest.fixture(scope="module")
def questions() -> dict[str, tuple[str, str]]:
    found = {}
    for name, messages in stdlib.questions():
        assert name not in found, name
        user, assistant = check_messages(messages)
        found[name] = user["content"], assistant["content"]
    return found


def test_there_is_enough_to_train_on(documents, questions) -> None:
    assert 400 < len(documents) < 600
    assert 7e6 < sum(len(text.encode()) for _, text in documents) < 11e6
    kinds = Counter(name.partition(":")[0] for name in questions)
    assert {kind for kind, count in kinds.items() if count > 20} == set(kinds)
    assert kinds["method"] > 1500
    assert kinds["signature"] > 1500
    assert kinds["topic"] > 60


def test_documents_are_prose_without_tests_or_doubles(documents) -> None:
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names)
    assert len({text for _, text in documents}) == len(documents)
    assert {"heapq.py", "json/decoder.py", "topic/lambda"} <= set(names)
    assert "def in_table_c4(" in dict(documents)["stringprep.py"]
    assert "b3_exceptions = {" not in dict(documents)["stringprep.py"]  # a table
    assert not [n for n in names if re.search(r"(^|/)(tests?|idlelib|encodings|lib2to3|site-packages)/", n)]
    assert not [n for n in names if "sysconfigdata" in n]
    root = Path(sysconfig.get_path("stdlib"))
    assert dict(documents)["heapq.py"] == (root / "heapq.py").read_text("utf-8")
    for name, text in documents:
        assert sum(c.isalpha() or c.isspace() for c in text) >= 0.6 * len(text), name


def test_a_cleaned_module_is_still_python(documents) -> None:
    for name, text in documents:
        if name.endswith(".py") and len(text) < 20_000:
            compile(text, name, "exec", flags=ast.PyCF_ONLY_AST, dont_inherit=True)


def test_another_process_finds_the_same(documents) -> None:
    code = (
        "import hashlib; from pipelines import stdlib\n"
        "print(hashlib.sha256(repr(list(stdlib.documents())).encode()).hexdigest())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == hashlib.sha256(repr(documents).encode()).hexdigest()


def test_signatures_agree_with_inspect(questions) -> None:
    checked = 0
    for module in ("heapq", "shutil", "textwrap", "bisect", "fnmatch", "statistics"):
        for name, value in vars(import_module(module)).items():
            told = questions.get(f"signature:{module}.{name}")
            if told is None or not inspect.isfunction(value):
                continue
            written = told[1].removeprefix(f"Its signature is {name}").removesuffix(".")
            arguments = ast.parse(f"lambda {written[1:-1]}: 0", mode="eval").body.args
            theirs = inspect.signature(value).parameters.values()
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
            assert names == [p.name for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            assert [a.arg for a in arguments.kwonlyargs] == [p.name for p in theirs if p.kind == p.KEYWORD_ONLY]
            checked += 1
    assert checked > 40


def test_answers_are_what_the_docstrings_say(questions) -> None:
    assert "heapq.nsmallest" in questions["function:heapq.nsmallest"][0]
    assert questions["function:heapq.nsmallest"][1].startswith("Find the n smallest elements in a dataset.")
    assert questions["function:math.gcd"][1] == "Greatest Common Divisor."
    assert questions["signature:shutil.copytree"][1].startswith("Its signature is copytree(src, dst, symlinks=False")
    assert questions["module:zipfile"][1] == "Read and write ZIP files."
    assert "method:str.capitalize" in questions
    assert not [name for name in questions if "._" in name]


def test_made_chats_are_true(questions) -> None:
    for name, (_, answer) in questions.items():
        kind, _, what = name.partition(":")
        if kind == "sum":
            left, right = answer.rstrip(".").split(" = ")
            assert eval(left) == int(right)
        elif kind == "spelling":
            assert answer == f"{what} is spelt {' '.join(what)}."
        elif kind == "letters":
            letter, times = re.fullmatch(r"The letter (.) occurs (.*) in \w+\.", answer).groups()
            count = {"once": 1, "twice": 2}.get(times) or int(times.split()[0])
            assert what.count(letter) == count


def test_no_answer_is_junk(questions) -> None:
    answers = [
        a for n, (_, a) in questions.items() if n.split(":")[0] not in ("sum", "identity", "spelling", "letters")
    ]
    assert len(set(answers)) == len(answers)
    assert len({ask for ask, _ in questions.values()}) == len(questions)
    for answer in answers:
        assert 15 <= len(answer) <= 600
        assert "\n" not in answer
        assert " at 0x" not in answer
    assert math.isclose(sum("Internal" in a for a in answers) / len(answers), 0, abs_tol=0.01)


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the sum of a and b.\n\n    >>> add(1, 2)\n    3", "Return the sum of a and b."),
        ("add(a, b) -> number\n\nReturn the sum of a and b.", "Return the sum of a and b."),
        ("Wraps over\n    two lines of text.\n", "Wraps over two lines of text."),
        ("Short first one.\n\nAnd a second that says more.", "Short first one. And a second that says more."),
        ("The keys are these.  They are:\n\n- a\n- b", "The keys are these."),
        ("XXX fix me please now", None),
        (">>> 1 + 1\n2", None),
        ("Internal function of this.", None),
        ("Too short", None),
    ],
)
def test_first_paragraph(docstring: str, answer: str | None) -> None:
    assert first_paragraph(docstring) == answer


def test_signatures_from_source() -> None:
    source = '''
class Box:
    """A box that holds things in it."""
    def put(self, item: int, /, *more: str, where: "str" = "top") -> None:
        """Put an item into the box, on top."""
    @staticmethod
    def make(size=3):
        """Make a box of the given size."""
    def _hidden(self):
        """Nobody should ask about this one."""
if True:
    def tidy(box, *, now=True):
        """Tidy the box up, now or later."""
'''
    found = {q.name: q.answer for q in source_questions("toys", ast.parse(source))}
    assert found["signature:toys.Box.put"] == "Its signature is put(item, /, *more, where='top')."
    assert found["signature:toys.Box.make"] == "Its signature is make(size=3)."
    assert found["signature:toys.tidy"] == "Its signature is tidy(box, *, now=True)."
    assert found["class:toys.Box"] == "A box that holds things in it."
    assert not [name for name in found if "hidden" in name]


def test_long_tables_are_cut_out(tmp_path, monkeypatch) -> None:
    words = '"""Words about the codes, long enough to be kept as a document."""\n' * 5
    codes = "CODES = [\n" + "    0x1234, 0x5678, 0x9abc,\n" * 40 + "]\n"
    names = "NAMES = [\n" + "    hello, world, these, are, words,\n" * 40 + "]\n"
    (tmp_path / "os.py").write_text(words + codes + names)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "more.py").write_text(words)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(stdlib.documents()) == [("os.py", words + names)]


def test_a_python_without_sources_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(SourceError, match=r"python311.zip.*--set corpus.source=PATH"):
        next(stdlib.documents())
    with pytest.raises(SourceError, match=r"--set corpus.source=PATH"):
        next(stdlib.questions())
    shutil.copy(ast.__file__, tmp_path / "os.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SourceError, match=r"topics.py is missing.*--set corpus.source=PATH"):
        list(stdlib.documents())


def test_identity_reads_nothing_and_names_the_version() -> None:
    code = (
        "import sys; from pipelines import stdlib\n"
        "sys.addaudithook(lambda event, args: event == 'open' and sys.exit(f'opened {args[0]}'))\n"
        "print(stdlib.identity())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == stdlib.identity(), done.stderr
    assert f"cpython-{sys.version_info.major}.{sys.version_info.minor}." in stdlib.identity()
