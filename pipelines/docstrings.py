"""Questions and answers from docstrings and signatures, of Python sources and of compiled modules.

A pair is true by construction: the answer is the first paragraph of the docstring, or the signature itself.
Private names are left out, and so is what reads as no answer.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

ASK = {
    "module": (
        "What is the Python module {} for?",
        "Describe the Python module {}.",
        "When would I use the Python module {}?",
    ),
    "class": ("What is the class {}?", "What does the Python class {} represent?", "Describe the Python class {}."),
    "function": ("What does {} do?", "Explain what the Python function {} does.", "What is {} for in Python?"),
    "method": ("What does the method {} do?", "Explain the Python method {}.", "What is the method {} for?"),
    "signature": ("What arguments does {} take?",),
    "topic": ("Explain this topic of the Python language: {}.",),
}
SHORTEST, LONGEST = 15, 600  # characters of an answer
BRIEF, BRIEF_BOTH = 60, 240  # a first paragraph under BRIEF takes the second along, up to BRIEF_BOTH together
JUNK = re.compile(r"(>>>|\$|@|XXX|TODO|FIXME|See |Internal|Deprecated|\W*$)|.* at 0x", re.DOTALL)
TOPIC_JUNK = re.compile(r"object\.__|---|(New|Changed) in version|\(See ")
CALL = re.compile(r"[\w.]+\(.*?\)(\s*->.*)?$", re.DOTALL)  # old C docstrings open with how they are called

# Compiled halves of public modules; all of these are cheap to import and touch nothing outside the process.
HALVES = (
    "_bisect:bisect _bz2:bz2 _codecs:codecs _collections:collections _csv:csv _datetime:datetime _decimal:decimal "
    "_functools:functools _heapq:heapq _io:io _lzma:lzma _operator:operator _pickle:pickle _queue:queue "
    "_random:random _socket:socket _string:string _struct:struct _weakref:weakref posix:os nt:os"
)
# Importing these changes the terminal, starts something, or only serves CPython's own tests.
NOT_IMPORTED = frozenset({"readline", "nis", "ossaudiodev", "spwd", "audioop"})


@dataclass(frozen=True)
class Question:
    """One question with its answer. `name` is kind:what, for instance method:heapq.merge."""

    name: str
    ask: str
    answer: str


def source_questions(module: str, tree: ast.Module) -> Iterator[Question]:
    """Questions about a module by its syntax tree: itself, its public classes, methods and functions."""
    if any(part.startswith("_") for part in module.split(".")):
        return
    yield from _about("module", module, ast.get_docstring(tree))
    for node in _definitions(tree):
        name = f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _about("class", name, ast.get_docstring(node))
            for method in _definitions(node):
                if not isinstance(method, ast.ClassDef):
                    whole, docstring = f"{name}.{method.name}", ast.get_docstring(method)
                    yield from _about("method", whole, docstring)
                    yield from _takes(whole, docstring, _written_signature(method, in_class=True))
        else:
            yield from _about("function", name, ast.get_docstring(node))
            yield from _takes(name, ast.get_docstring(node), _written_signature(node, in_class=False))


def compiled_questions() -> Iterator[Question]:
    """Questions about what is written in C: the builtins, compiled modules, and compiled halves of modules."""
    halves = dict(pair.split(":") for pair in HALVES.split())
    for name in sorted(sys.stdlib_module_names):
        public = halves.get(name, name)
        if name in NOT_IMPORTED or public.startswith("_") or name.startswith("xx") or not _is_compiled(name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                module, seen_as = importlib.import_module(name), importlib.import_module(public)
            except ImportError:
                continue  # compiled against a system library that this machine lacks
        if public == name and name != "builtins":
            yield from _about("module", name, module.__doc__)
        yield from _compiled_members("" if name == "builtins" else f"{public}.", module, seen_as)


def topic_question(name: str, text: str) -> Question | None:
    """The question for one of pydoc's language topics: its heading, and the first paragraph of prose under it."""
    heading, _, rest = text.strip().partition("\n")
    for paragraph in re.split(r"\n\s*\n", rest):
        answer = _plain(paragraph)
        if answer and "===" not in answer and "***" not in answer and not TOPIC_JUNK.match(answer):
            answer = _whole_sentences(answer)
            if SHORTEST <= len(answer) <= LONGEST:
                return Question(f"topic:{name}", ASK["topic"][0].format(heading), answer)
    return None


def first_paragraph(docstring: str) -> str | None:
    """The part of a docstring that answers "what is it?", on one line; None where it reads as no answer."""
    paragraphs = [p for p in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if p.strip()]
    while paragraphs and CALL.match(paragraphs[0].strip()):
        paragraphs.pop(0)
    if not paragraphs:
        return None
    answer, *more = [_plain(p) for p in paragraphs[:2]]
    if len(answer) < BRIEF and more and more[0] and not JUNK.match(more[0]):
        both = f"{answer.rstrip('.:')}. {more[0]}"
        answer = both if len(both) <= BRIEF_BOTH else answer
    answer = _whole_sentences(answer)
    if JUNK.match(answer) or not SHORTEST <= len(answer) <= LONGEST or answer.count(" ") < 2:
        return None
    return answer


def _plain(paragraph: str) -> str:
    """A paragraph on one line, without the indented example that may follow it; empty if it is all example."""
    kept: list[str] = []
    for line in paragraph.splitlines():
        if line.startswith((" ", "\t", ">>>", "- ", "* ")):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split())


def _whole_sentences(answer: str) -> str:
    """An answer less the last sentence, if that only announces what comes after it."""
    return answer if not answer.endswith(":") else answer[: answer.rfind(". ") + 1]


def _about(kind: str, name: str, docstring: str | None) -> Iterator[Question]:
    answer = first_paragraph(docstring) if docstring else None
    if answer:
        asks = ASK[kind]
        yield Question(f"{kind}:{name}", asks[zlib.crc32(name.encode()) % len(asks)].format(name), answer)


def _takes(name: str, docstring: str | None, signature: str) -> Iterator[Question]:
    """The question for a signature, where somebody thought the name worth a docstring."""
    if not docstring:
        return
    answer = f"Its signature is {name.rpartition('.')[2]}{signature}."
    if signature != "()" and not JUNK.match(answer) and len(answer) <= LONGEST and "<" not in signature:
        yield Question(f"signature:{name}", ASK["signature"][0].format(name), answer)


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public classes and functions written in the body of `node`, also under an `if` or a `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                yield child
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child)


def _written_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, in_class: bool) -> str:
    """The arguments as they are written, without annotations and without `self`."""
    arguments = node.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if in_class and not static:
        del (arguments.posonlyargs or arguments.args)[:1]
    return f"({ast.unparse(arguments)})"


def _is_compiled(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and (spec.origin == "built-in" or not (spec.origin or ".py").endswith(".py"))


def _compiled_members(prefix: str, module: ModuleType, seen_as: ModuleType) -> Iterator[Question]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(seen_as, name, None) is not value:
            continue
        if inspect.isbuiltin(value):
            yield from _about("function", prefix + name, value.__doc__)
            yield from _takes(prefix + name, value.__doc__, _compiled_signature(value))
        elif isinstance(value, type) and value.__name__ == name:
            yield from _about("class", prefix + name, value.__doc__)
            for attribute, method in sorted(vars(value).items()):
                if not attribute.startswith("_") and inspect.isroutine(method):
                    whole = f"{prefix}{name}.{attribute}"
                    yield from _about("method", whole, method.__doc__)
                    yield from _takes(whole, method.__doc__, _compiled_signature(getattr(value, attribute)))


def _compiled_signature(value: object) -> str:
    """The signature a compiled function tells, without `self`; `()` where it tells none."""
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError):  # AttributeError: a default that names what does not exist (3.13)
        return "()"
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "type"):
        parameters = parameters[1:]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
