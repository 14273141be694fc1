"""Write the pages of the site: the guides with their links, the reference, and the source files that links lead to.

A link of a guide means what it means on GitHub. The file it leads to is a page: a Markdown file as it is, any other as
a page that shows its text, a folder as a page that lists its files. A link to nothing is left for mkdocs to refuse.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
from pathlib import Path

from tests.house.public import MEMBERS, ROOT, SETUP, SETUP_LANGUAGE_MODEL, SETUP_METHOD, PublicName, Source, source

FIRST_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_LINK = re.compile(r"(\[[^\]]*\]\()([^)#\s]+)((?:#[\w-]+)?\))")
_FENCE = re.compile(r"^\s*(```|~~~)")
_LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".toml": "toml", ".txt": "text", ".yml": "yaml"}
#: files that are pages, or pictures on pages, as they are
_SHOWN_AS_IT_IS = (".md", ".png", ".svg")
FAMILIES = {
    "lora_family": "Configs of LoRA and its relatives",
    "shared_factors": "Configs of methods whose layers share factors",
    "lycoris": "Configs of the products of LyCORIS",
    "orthogonal": "Configs of orthogonal methods",
    "sparse": "Configs of sparse and elementwise methods",
    "weight_dependent": "Configs of methods whose change depends on the weight",
    "prompt": "Configs of prompt methods",
    "routed": "Configs of routed methods",
}


def write_pages(folder: Path, root: Path = ROOT) -> None:
    """Write all pages of the repository at ``root`` into ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = {**guide_pages(root), **reference_pages(source() if root == ROOT else Source(root))}
    for name, content in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# -- guides ------------------------------------------------------------------------------------------------------------


def guide_pages(root: Path) -> dict[str, str | bytes]:
    """Return path -> text of the guides, and of every file that a link of theirs leads to; pictures are bytes."""
    guides = [p.relative_to(root).as_posix() for p in sorted((root / "examples").glob("*.md"))]
    waiting, found = [*FIRST_PAGES, *guides], dict[str, str | bytes]()
    while waiting:
        name = waiting.pop()
        path = root / name
        if name in found or not path.exists():
            continue
        if path.suffix != ".md":
            is_picture = path.suffix in _SHOWN_AS_IT_IS
            found[name] = path.read_bytes() if is_picture else _shown(path, name)
            continue
        found[name] = _with_page_links(path.read_text(encoding="utf-8"), name, root, waiting)
    return {_page_of(root, name): content for name, content in found.items()}


def _page_of(root: Path, name: str) -> str:
    """Return the page of a file or folder of the repository."""
    path = root / name
    return f"{name}/index.md" if path.is_dir() else name if path.suffix in _SHOWN_AS_IT_IS else f"{name}.md"


def _with_page_links(text: str, name: str, root: Path, waiting: list[str]) -> str:
    """Return the text of a page with its links to files turned into links to their pages; these are ``waiting``."""

    def turn(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"\w+:", target):
            return match[0]
        path = (root / name).parent.joinpath(target).resolve()
        if not path.is_relative_to(root.resolve()) or not path.exists():
            return match[0]
        file = path.relative_to(root.resolve()).as_posix()
        waiting.append(file)
        page = posixpath.relpath(_page_of(root, file), posixpath.dirname(name) or ".")
        return f"{match[1]}{page}{match[3]}"

    lines, fenced = [], False
    for line in text.splitlines(keepends=True):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced else _LINK.sub(turn, line))
    return "".join(lines)


def _shown(path: Path, name: str) -> str:
    """Return the page of a file that is not Markdown, or of a folder."""
    if path.is_dir():
        files = sorted(
            f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts
        )
        return f"# {name}\n\n" + "".join(f"- `{f}`\n" for f in files)
    fence = "`" * 8
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return f"# {name}\n\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


# -- reference ---------------------------------------------------------------------------------------------------------


def reference_pages(code: Source) -> dict[str, str]:
    """Return path -> text of the pages of public names, a page a topic."""
    functions, programs, errors = [], [], []
    families: dict[str, list[PublicName]] = {family: [] for family in FAMILIES}
    for public in code.names("adaptc"):
        if public.module == "adaptc.errors":
            errors.append(public)
        elif public.name.endswith("Config"):
            families[public.module.split(".")[2]].append(public)
        else:
            (programs if isinstance(public.node, ast.ClassDef) else functions).append(public)
    topics = {
        "functions": ("Functions", "Functions of `adaptc`.", functions),
        "programs": ("Programs", "What the functions return, and what users call of it.", programs),
        "errors": ("Errors", "Every failure is an `AdaptcError`, and a call that raised one changed nothing.", errors),
    }
    for family, title in FAMILIES.items():
        topics[f"configs_{family}"] = (title, "Names, fields and defaults are those of PEFT.", families[family])
    for package in ("training", "distributed", "prefixes", "engines", "exporters", "methods", "debug"):
        module = f"adaptc.{package}"
        said = (ast.get_docstring(code.tree(module)) or "").partition("\n\n")[0]
        topics[package] = (module, said, code.names(module))
    pages = {f"reference/{name}.md": _topic(code, *topic) for name, topic in topics.items()}
    pages["reference/index.md"] = _overview({name: (topic[0], topic[2]) for name, topic in topics.items()})
    return pages


def _topic(code: Source, title: str, said: str, names: list[PublicName]) -> str:
    parts = [f"# {title}\n\n{said}\n"]
    for public in names:
        members = ", ".join(MEMBERS.get(public.name, ()))
        options = (
            [f"      members: [{members}]"] if members else ["      members: false\n      inherited_members: false"]
        )
        if public.name.endswith("Config"):
            # The table says it better than a signature of thirty fields.
            options.append("      show_signature: false\n      show_docstring_attributes: false")
        parts.append(f"::: {public.path}\n    options:\n" + "\n".join(options) + "\n")
        if public.name.endswith("Config"):
            parts.append(_table_of_fields(code, public))
    return "\n".join(parts)


def _table_of_fields(code: Source, public: PublicName) -> str:
    """Return the fields of a config as a table; those of base classes come last."""
    refused = code.unsupported(public)
    rows = []
    for field in code.fields(public):
        notes = [field.meaning] if field.meaning else []
        notes += ["Setting it is refused."] if field.name in refused else []
        cells = [f"`{field.name}`", _code(field.annotation), _code(field.default), " ".join(notes)]
        rows.append("| " + " | ".join(cells) + " |\n")
    return "| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _overview(topics: dict[str, tuple[str, list[PublicName]]]) -> str:
    parts = [
        "# Reference\n\nThe public names, by topic. The examples start with these lines:\n",
        f"```python\n{SETUP}```\n",
        f"Those with a language model `lm` go on:\n\n```python\n{SETUP_LANGUAGE_MODEL}```\n",
        f"Those with a method of one's own go on:\n\n```python\n{SETUP_METHOD}```\n",
    ]
    for page, (title, names) in topics.items():
        rows = "".join(f"| [`{n.name}`][{n.path}] | {_first_sentence(n)} |\n" for n in names)
        parts.append(f"## [{title}]({page}.md)\n\n| name | meaning |\n|---|---|\n{rows}")
    return "\n".join(parts)


def _first_sentence(public: PublicName) -> str:
    text = " ".join((ast.get_docstring(public.node) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    return re.split(r"(?<=\w[.:])\s", text, maxsplit=1)[0].replace("|", "\\|")
