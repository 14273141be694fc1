"""Check how the source is laid out, by the rules of CONTRIBUTING.md. ``make lint`` runs it.

No two classes and no two files share a name. A folder has at most :data:`MAX_FILES` files. A file below
:data:`MIN_LINES` lines has more than one importer, or stands for something: a method, a package, an entry point. No
module sets an attribute of what it imported, since a room below could then call a room above.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: folder -> the package that it is imported as
SOURCE = {"adaptc": "adaptc", "passes": "adaptc.passes", "kernels": "adaptc.kernels"}
MAX_FILES = 15
MAX_BYTES = 20480
MIN_LINES = 60
#: packages with a file for each of many things of one kind, however small: methods, formats, modes, passes, ...
ONE_A_FILE = tuple(
    f"adaptc.{package}."
    for package in (
        *("methods", "adapter_files.formats", "cli", "kernels", "generation.modes", "quantized_layers"),
        *("passes.adapt", "passes.virtual_tokens", "passes.optimize", "passes.lower", "passes.train"),
    )
)
#: files of any size that tables of public names name
NAMED = ("adaptc.adapters.arrow_adapter", "adaptc.debug", "adaptc.program.rescale", "adaptc.runtime.recompiles")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return dotted name -> file of all source files; a package's ``__init__`` has the package's name."""
    found: dict[str, Path] = {}
    for folder, package in SOURCE.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def faults(files: Mapping[str, Path]) -> Iterator[str]:
    """Yield a line for each rule that the files, by dotted name, break."""
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    yield from _same_names(
        "two files are called", ((f.stem, n) for n, f in files.items() if not f.stem.startswith("__"))
    )
    classes = ((c.name, name) for name, tree in trees.items() for c in tree.body if isinstance(c, ast.ClassDef))
    yield from _same_names("two classes are called", ((c, n) for c, n in classes if not c.startswith("_")))
    folders: dict[Path, int] = defaultdict(int)
    for file in files.values():
        folders[file.parent] += 1
        if (size := file.stat().st_size) > MAX_BYTES:
            yield f"{file.name} has {size} bytes, at most {MAX_BYTES} are read easily: move one idea out"
    for folder, count in folders.items():
        if count > MAX_FILES:
            yield f"{folder.name}/ has {count} files, and at most {MAX_FILES} are found easily: group some"
    yield from _small_files(files, trees)
    for name, tree in trees.items():
        for text in _attributes_set(tree):
            yield f"{name} sets {text} when it is imported: pass it as an argument, so that imports tell who knows whom"


def _attributes_set(tree: ast.Module) -> Iterator[str]:
    for statement in tree.body:
        assigned = statement.targets if isinstance(statement, ast.Assign) else []
        parts = (part for target in assigned for part in ast.walk(target))
        yield from (
            ast.unparse(part) for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        )


def _same_names(said: str, named: Iterator[tuple[str, str]]) -> Iterator[str]:
    homes: dict[str, list[str]] = defaultdict(list)
    for name, home in named:
        homes[name].append(home)
    for name, where in homes.items():
        if len(where) > 1:
            yield f"{said} {name}: {', '.join(where)}"


def _small_files(files: Mapping[str, Path], trees: Mapping[str, ast.Module]) -> Iterator[str]:
    importers: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    importers[full if full in files else node.module].add(name)
    for name, file in files.items():
        lines = len(file.read_text(encoding="utf-8").splitlines())
        small = lines < MIN_LINES and not file.stem.startswith("__") and name not in NAMED
        if small and not name.startswith(ONE_A_FILE) and len(importers[name]) < 2:
            yield f"{name} has {lines} lines and one importer, {', '.join(importers[name]) or 'none'}: put it there"


def main() -> int:
    """Print all faults of the source, one a line; return 1 if there are any."""
    found = list(faults(modules()))
    print("\n".join(found) or "The layout keeps the rules of CONTRIBUTING.md.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
