"""Measures of a Python package's source: lengths, parameters, imports, words.

tests/unit/test_layout.py sets their limits, scripts/house.py prints them.
"""

import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Imports point from later groups to earlier ones, or to the same group as long as no cycle arises.
IMPORT_ORDER = (
    {"errors", "store", "isolated", "remote_code", "internals"},
    {"recipe"},
    {"losses", "processes", "cli"},
    {"tasks", "corpora", "stages", "places"},
    {"data", "models", "terms"},
    {"compress", "teacher_outputs", "served", "module", "prepare"},
    {"training", "callbacks", "packing"},
    {"evaluate"},
    {"export"},
    {"resume", "teacher", "student", "dry_run"},
    {"train", "api"},
)
TARGETS = {"callbacks", "tasks", "terms", "corpora", "losses"}  # what `_target_` in a recipe names

FILE = r"\w+(?:\.py|/)"

# Words of the private language that the first version had; shared/style.md, section Words.
UNWANTED = (
    "told", "said", "tutor", "wanted", "spelled", "loosened", "unobserved", "informed", "narrator",
)  # fmt: skip
UNWANTED_NAMES = (
    *UNWANTED, "found", "own", "whole", "asked", "given", "kept", "taught", "answered", "looks",
    "restructured", "decided", "useful",
)  # fmt: skip
COUNTED = ("found", "own", "whole", "said", "told", "asked", "given", "kept", "answers", "wanted")


@dataclass(frozen=True)
class Function:
    """One `def`, nested ones and methods included."""

    source: "Source"
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: str  # name of the class around it, or ""

    def __str__(self) -> str:
        return f"{self.source.name}:{self.node.lineno} {self.node.name}"

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def parameters(self) -> list[ast.arg]:
        """Named parameters without `self`, `cls` and the `ctx` of an autograd function."""
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return [each for each in named if each.arg not in ("self", "cls", "ctx")]

    @property
    def is_recipe_constructor(self) -> bool:
        """Whether its parameters are recipe keys: a constructor that `_target_` can name."""
        public = not self.owner.startswith("_") and self.node.name == "__init__"
        return public and bool(self.owner) and self.source.top in TARGETS

    @property
    def is_kernel(self) -> bool:
        """Whether it is compiled for a GPU, and takes pointers, strides and numbers one by one."""
        return any(ast.unparse(each) == "triton.jit" for each in self.node.decorator_list)

    @property
    def takes_run(self) -> bool:
        """Whether a parameter is annotated with the recipe's `Run`."""
        annotations = [each.annotation for each in self.parameters if each.annotation is not None]
        return any(re.search(r"\bRun\b", ast.unparse(each)) for each in annotations)


class Source:
    """One Python file of a package."""

    def __init__(self, file: Path, root: Path) -> None:
        self.file, self.root = file, root
        self.text = file.read_text()
        self.tree = ast.parse(self.text)

    @property
    def name(self) -> str:
        return str(self.file.relative_to(self.root))

    @property
    def top(self) -> str:
        """The top-level module or package that the file belongs to."""
        return self.file.relative_to(self.root).parts[0].removesuffix(".py")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def functions(self) -> list[Function]:
        return list(self._functions(self.tree, ""))

    def _functions(self, node: ast.AST, owner: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            is_class = isinstance(child, ast.ClassDef)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(self, child, owner)
            yield from self._functions(child, child.name if is_class else owner)

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and top-level module of each import that runs, from the package itself."""
        package = self.root.name
        imports = []
        for node in _runtime_nodes(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                imports += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
                imports.append((node.lineno, str(node.module).split(".")[1]))
            elif isinstance(node, ast.Import):
                parts = [alias.name.split(".") for alias in node.names]
                imports += [
                    (node.lineno, part[1]) for part in parts if part[:1] == [package] != part
                ]
        return imports

    @cached_property
    def identifiers(self) -> list[tuple[int, str]]:
        """Line and name of every name token."""
        return [(each.start[0], each.string) for each in self._tokens if each.type == tokenize.NAME]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """Line and text of comments and of all strings: docstrings, messages, recipe keys."""
        kinds = {tokenize.COMMENT, tokenize.STRING}
        kinds |= {
            getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name)
        }
        return [(each.start[0], each.string) for each in self._tokens if each.type in kinds]

    @cached_property
    def documentation(self) -> list[tuple[int, str]]:
        """Line and text of comments and of the docstrings of modules, classes and functions."""
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        docstrings = [(node.body[0].lineno, ast.get_docstring(node)) for node in nodes if node.body]
        comments = [
            (each.start[0], each.string) for each in self._tokens if each.type == tokenize.COMMENT
        ]
        return [(line, text) for line, text in docstrings if text] + comments

    @cached_property
    def _tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _runtime_nodes(child)


def read_package(root: Path) -> list[Source]:
    """Every file of a package but its topmost `__init__.py`, which holds the map."""
    files = [file for file in sorted(root.rglob("*.py")) if file != root / "__init__.py"]
    return [Source(file, root) for file in files]


def percentile(values: Iterable[int], share: float) -> int:
    """The smallest value that `share` of all values do not exceed, roughly: index `share * n`."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def modules_in(folder: Path) -> set[str]:
    """`name.py` of each module and `name/` of each package in a folder."""
    modules = {file.name for file in folder.glob("*.py") if not file.name.startswith("__")}
    return modules | {f"{file.parent.name}/" for file in folder.glob("*/__init__.py")}


def mapped_in(docstring: str) -> set[str]:
    """The modules that a package's docstring maps, in table rows, list items or aligned lines."""
    tables = re.findall(r"^\|([^|]*)\|", docstring, re.MULTILINE)
    items = re.findall(r"^- ([^:]*):", docstring, re.MULTILINE)
    lines = re.findall(r"^(?:    )?(\w+(?:\.py|/)) {2,}", docstring, re.MULTILINE)
    return {name for head in [*tables, *items, *lines] for name in re.findall(FILE, head)}


def shared_names(sources: list[Source]) -> dict[str, list[str]]:
    """Names that several modules or packages have."""
    names: dict[str, list[str]] = {}
    for source in sources:
        name = source.file.parent.name if source.file.name == "__init__.py" else source.file.stem
        if source.file.name != "__main__.py":
            names.setdefault(name, []).append(source.name)
    return {name: files for name, files in names.items() if len(files) > 1}


def imports_against_the_order(sources: list[Source]) -> list[str]:
    rank = {name: rank for rank, names in enumerate(IMPORT_ORDER) for name in names}
    return [
        f"{source.name}:{line} imports {imported}"
        for source in sources
        for line, imported in source.imports
        if rank.get(imported, -1) > rank.get(source.top, len(rank))
    ]


def import_cycles(sources: list[Source]) -> list[str]:
    """Pairs of top-level modules that import each other, directly or through others."""
    direct: dict[str, set[str]] = {}
    for source in sources:
        names = {name for _, name in source.imports} - {source.top}
        direct.setdefault(source.top, set()).update(names)
    reached = {top: _reached(top, direct) for top in direct}
    return sorted(
        f"{top} <-> {other}"
        for top in direct
        for other in reached[top]
        if top < other and top in reached.get(other, ())
    )


def _reached(top: str, direct: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = set(direct.get(top, ()))
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= direct.get(name, set()) - reached
    return reached


def arrows(sources: list[Source]) -> set[tuple[str, str]]:
    """Which top-level module or package imports from which other one."""
    return {(each.top, name) for each in sources for _, name in each.imports if name != each.top}


def long_lines(sources: list[Source]) -> list[str]:
    """Places of lines over 100 characters; a type checker's comment at the end does not count."""
    return [
        f"{source.name}:{number}"
        for source in sources
        for number, line in enumerate(source.lines, 1)
        if len(line.partition("  # type: ")[0]) > 100
    ]


def unwanted_names(sources: list[Source]) -> list[str]:
    """Identifiers with a word of UNWANTED in them, or that are a word of UNWANTED_NAMES."""
    return [
        f"{source.name}:{line} {name}"
        for source in sources
        for line, name in source.identifiers
        if name.strip("_").lower() in UNWANTED_NAMES or set(_parts(name)) & set(UNWANTED)
    ]


def _parts(name: str) -> list[str]:
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def unwanted_words(sources: list[Source]) -> list[str]:
    """Places of the words of UNWANTED in comments and strings."""
    pattern = re.compile(rf"\b({'|'.join(UNWANTED)}|look(s|ed)? at)\b", re.IGNORECASE)
    return [
        f"{source.name}:{line} {match[0]}"
        for source in sources
        for line, text in source.prose
        for match in pattern.finditer(text)
    ]


def nulls(sources: list[Source]) -> list[str]:
    """`null` in docstrings and comments; the recipe's own modules speak of YAML and may say it."""
    return [
        f"{source.name}:{line}"
        for source in sources
        if source.top != "recipe"
        for line, text in source.documentation
        if re.search(r"\bnull\b", text)
    ]


def word_counts(sources: list[Source]) -> Counter[str]:
    """How often each word of COUNTED stands in a package, in names and in prose."""
    words = re.findall(r"[a-z]+", " ".join(source.text for source in sources).lower())
    return Counter({word: words.count(word) for word in COUNTED})


def table(root: Path) -> list[tuple[str, str, str]]:
    """What is measured, its value, and its limit, for the package in a folder."""
    sources = read_package(root)
    functions = [function for source in sources for function in source.functions]
    files = [len(source.lines) for source in sources]
    lengths = [function.lines for function in functions]
    many = [each for each in functions if len(each.parameters) > 6]
    words = word_counts(sources)
    top = {source.top for source in sources}
    rows = [
        ("top-level modules", sum(f"{name}.py" in modules_in(root) for name in top), "16"),
        ("packages", sum(f"{name}/" in modules_in(root) for name in top), ""),
        ("files", len(files), ""),
        ("lines", sum(files), ""),
        ("lines of a file, median", round(statistics.median(files)), "120"),
        ("lines of a file, most", max(files), "300"),
        ("functions", len(functions), ""),
        ("lines of a function, median", round(statistics.median(lengths)), "10"),
        ("lines of a function, 95th percentile", percentile(lengths, 0.95), "35"),
        ("lines of a function, most", max(lengths), ""),
        ("functions that take a whole Run", sum(each.takes_run for each in functions), "25"),
        ("functions with more than 6 parameters", _narrowed(many), "0"),
        ("names that two modules share", len(shared_names(sources)), "0"),
        ("arrows between top-level modules and packages", len(arrows(sources)), ""),
        ("imports against the order", len(imports_against_the_order(sources)), "0"),
        ("lines over 100 characters", len(long_lines(sources)), "0"),
        ("private names", len(unwanted_names(sources)), "0"),
        ("private words", len(unwanted_words(sources)), "0"),
        ("null in docstrings and comments", len(nulls(sources)), "0"),
        *((f'"{word}"', words[word], "") for word in COUNTED),
    ]
    return [(name, f"{value:,}", limit) for name, value, limit in rows]


def _narrowed(functions: list[Function]) -> int:
    return sum(not function.is_recipe_constructor for function in functions)
