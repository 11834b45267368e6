"""What Python packages define and document, read from their source with `ast`: no package is imported or run.

A name is reported as users write it: what a package takes over from its private modules (`from ._solvers import solve`)
belongs to the package, and what no public name leads to is left out.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_UNWANTED_PARTS = {
    "benchmark",
    "benchmarks",
    "conftest",
    "demo",
    "demos",
    "doc",
    "docs",
    "example",
    "examples",
    "extern",
    "externals",
    "scripts",
    "templates",
    "test",
    "testdata",
    "testing",
    "tests",
    "third_party",
    "vendor",
    "vendored",
}
# The function by which compiled functions get their docstring.
_ATTACH = "add_docstr"
_MAX_FILE_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Documented:
    """Something with a docstring.

    Attributes:
        name: Public qualified name, such as `package.module.Class.method`.
        module: The module that defines it, which may be private.
        docstring: As in the source.
    """

    name: str
    module: str
    docstring: str


@dataclass
class Module:
    """What one source file defines and takes over.

    Attributes:
        name: Dotted name; a package's own name for its `__init__.py`.
        is_package: Whether it is such a file.
        docstrings: Name within the module -> docstring; the empty name is the module's own.
        attached: Full name -> docstring, for those that the source attaches to compiled functions by a call.
        defined: Names of its top-level functions and classes.
        taken: Name here -> (module, name there), for `from ... import`.
        stars: Modules of which it takes all.
        exported: Its `__all__`, where it is a plain list.
    """

    name: str
    is_package: bool
    docstrings: dict[str, str] = field(default_factory=dict)
    attached: dict[str, str] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)
    taken: dict[str, tuple[str, str]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    exported: set[str] | None = None


def top_level_packages(site_packages: list[Path]) -> dict[str, Path]:
    """Find the packages of some folders.

    Args:
        site_packages: Folders of installed packages.

    Returns:
        Name -> the package's folder, or the file of a single module, by name; private ones and tests are left out.
    """
    found: dict[str, Path] = {}
    for folder in site_packages:
        for path in sorted(folder.iterdir()):
            is_package = path.is_dir() and (path / "__init__.py").is_file()
            name = path.stem
            if (is_package or path.suffix == ".py") and name.isidentifier() and _is_wanted(name) and name[0] != "_":
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def read_package(root: Path) -> Iterator[Documented]:
    """Read the documented public names of a package, file by file, those near its top first.

    Args:
        root: The package's folder, or the file of a single module.

    Yields:
        Each public name once, in a fixed order. A file is opened when its turn comes.
    """
    reader = _PackageReader(root)
    seen: set[str] = set()
    for module in reader.modules():
        for name, docstring in module.attached.items():
            # Compiled functions have no module to be grouped by: each stands for itself.
            if name not in seen:
                seen.add(name)
                yield Documented(name, name, docstring)
        for local_name, docstring in module.docstrings.items():
            name = reader.public_name(module.name, local_name)
            if name and name not in seen:
                seen.add(name)
                yield Documented(name, module.name, docstring)


def _is_wanted(part: str) -> bool:
    lower = part.lower()
    return (
        lower not in _UNWANTED_PARTS
        and not lower.startswith(("test_", "testing_"))
        and not lower.endswith(("_test", "_tests"))
    )


def is_private(name: str) -> bool:
    """Whether a part of a dotted name begins with an underscore."""
    return any(part.startswith("_") for part in name.split("."))


class _PackageReader:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, Module | None] = {}
        self._files = dict(self._list_files())
        self._aliases: dict[str, dict[tuple[str, str], str]] = {}

    def _list_files(self) -> Iterator[tuple[str, Path]]:
        if self._root.is_file():
            yield self._root.stem, self._root
            return
        files = (path for path in self._root.rglob("*.py") if path.stat().st_size <= _MAX_FILE_BYTES)
        for path in sorted(files, key=lambda path: (len(path.parts), path.as_posix())):
            parts = [self._root.name, *path.relative_to(self._root).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            if all(part.isidentifier() and _is_wanted(part) for part in parts) and parts[-1] != "__main__":
                yield ".".join(parts), path

    def modules(self) -> Iterator[Module]:
        """Parse the files that can hold public names, one by one, those near the top first."""
        for name, path in self._files.items():
            if self._may_be_public(name, path) and (module := self.module(name)) is not None:
                yield module

    def _may_be_public(self, name: str, path: Path) -> bool:
        return (
            not is_private(name)
            or any(name == origin for package in self._public_parents(name) for origin, _ in self._names_in(package))
            or _ATTACH.encode() in path.read_bytes()
        )

    @staticmethod
    def _public_parents(name: str) -> Iterator[str]:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if not is_private(package := ".".join(parts[:length])):
                yield package

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self._files.get(name)
            self._modules[name] = _parse(name, path) if path else None
        return self._modules[name]

    def public_name(self, module: str, local_name: str) -> str:
        """Return the shortest name that users reach a definition by; empty where there is none."""
        if not local_name:
            return "" if is_private(module) else module
        head, dot, rest = local_name.partition(".")
        for package in self._public_parents(module):
            if alias := self._names_in(package).get((module, head)):
                return f"{package}.{alias}{dot}{rest}"
        full = f"{module}.{local_name}"
        return "" if is_private(full) else full

    def _names_in(self, package: str) -> dict[tuple[str, str], str]:
        """Map the definitions that a package takes over to their names there."""
        if package not in self._aliases:
            public = {name: origin for name, origin in self._namespace(package, ()).items() if not is_private(name)}
            self._aliases[package] = {origin: name for name, origin in sorted(public.items(), reverse=True)}
        return self._aliases[package]

    def _namespace(self, name: str, trail: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """Resolve a module's names to where they are defined, through chains of packages and stars."""
        module = self.module(name)
        if module is None or name in trail or len(trail) > 6:
            return {}
        trail = (*trail, name)
        names: dict[str, tuple[str, str]] = {}
        for star in module.stars:
            exported = getattr(self.module(star), "exported", None)
            for key, origin in self._namespace(star, trail).items():
                if key in exported if exported is not None else not key.startswith("_"):
                    names[key] = origin
        for key, (source, there) in module.taken.items():
            names[key] = self._origin(source, there, trail)
        return names | {key: (name, key) for key in module.defined}

    def _origin(self, source: str, name: str, trail: tuple[str, ...]) -> tuple[str, str]:
        module = self.module(source)
        if module is None or name in module.defined or source in trail or len(trail) > 6:
            return source, name
        if name in module.taken:
            return self._origin(*module.taken[name], (*trail, source))
        for star in module.stars:
            origin = self._origin(star, name, (*trail, source))
            found = self.module(origin[0])
            if found is not None and origin[1] in found.defined:
                return origin
        return source, name


def _parse(name: str, path: Path) -> Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a package's invalid escape sequences are none of ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # a template, or source for another version of Python
    module = Module(name, path.stem == "__init__")
    if docstring := ast.get_docstring(tree, clean=False):
        module.docstrings[""] = docstring
    _read_body(module, tree.body)
    return module


def _read_body(module: Module, body: list[ast.stmt]) -> None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.defined.add(node.name)
            _read_definition(module, node, "")
        elif isinstance(node, ast.ImportFrom):
            _read_import(module, node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stars = len(module.stars)
            for block in ("body", "orelse", "finalbody"):
                _read_body(module, getattr(node, block, []))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                # A lazy package names each of its modules so, for type checkers; to follow all would be to read all.
                del module.stars[stars:]
        elif isinstance(node, ast.Expr | ast.Assign):
            _read_attached(module, node)
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
                module.exported = _literal_names(node.value)


def _read_definition(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, prefix: str) -> None:
    name = prefix + node.name
    if node.name.startswith("_") or name in module.docstrings:
        return
    if docstring := ast.get_docstring(node, clean=False):
        module.docstrings[name] = docstring
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                _read_definition(module, inner, f"{name}.")


def _read_import(module: Module, node: ast.ImportFrom) -> None:
    source = node.module or ""
    if node.level:
        parents = module.name.split(".")
        parents = parents[: len(parents) - node.level + module.is_package]
        source = ".".join([*parents, *([source] if source else [])])
    for alias in node.names:
        if alias.name == "*":
            module.stars.append(source)
        else:
            module.taken[alias.asname or alias.name] = (source, alias.name)


def _read_attached(module: Module, node: ast.Expr | ast.Assign) -> None:
    """Read `add_docstr(package.name, "...")` and `name = add_docstr(...)`: compiled functions are described so."""
    call = node.value
    if not (isinstance(call, ast.Call) and len(call.args) == 2):
        return
    if ast.unparse(call.func).rpartition(".")[2].lstrip("_") != _ATTACH:
        return
    target = node.targets[0] if isinstance(node, ast.Assign) else call.args[0]
    name = ast.unparse(target)
    if isinstance(node, ast.Assign):
        name = f"{module.name}.{name}"
    docstring = _literal_text(call.args[1])
    if docstring and not is_private(name) and name.startswith(module.name.split(".")[0] + "."):
        module.attached.setdefault(name, docstring)


def _literal_text(node: ast.expr) -> str:
    """Put together the literal parts of `"..." + "...".format(...)`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal_text(node.left) + _literal_text(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _literal_text(node.func.value)
    return ""


def _literal_names(node: ast.expr) -> set[str] | None:
    try:
        return set(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError):
        return None
