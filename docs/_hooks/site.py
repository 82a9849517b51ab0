"""What the docs site shows that no page says by hand: options, settings, schema and metrics, read from the code.

A page writes ``<!-- generated: NAME -->`` where it wants one of `GENERATED`. It is filled in when the site is built, so
that it can't be older than the code. Links from a page to files of the checkout that are no pages become plain text.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

#: Files at the root that the site shows too, by the page that shows them.
COPIES = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;") or " "


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


# ---- the command line ------------------------------------------------------------------------------------------


def command_line() -> str:
    """Return every verb of `qvl` with its arguments and options, by panels as in its help."""
    import typer.main

    from toolkit.cli import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        context = command.context_class(command, info_name=f"qvl {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## qvl {name}", f"    qvl {name} {usage}", *_paragraphs(command.help or "")]
        panels: dict[str, list[list[str]]] = {}
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name == "help":
                continue
            panel = getattr(parameter, "rich_help_panel", None) or (
                "Arguments" if parameter.param_type_name == "argument" else "Options"
            )
            panels.setdefault(panel, []).append(_option(parameter, context))
        for panel, rows in panels.items():
            parts += [f"**{panel}**", _table(["", "value", "", "default"], rows)]
    return "\n\n".join(parts)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "")):
        yield " ".join(paragraph.split()).replace("<", "&lt;")


def _option(parameter: Any, context: Any) -> list[str]:
    argument = parameter.param_type_name == "argument"
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    kind = parameter.metavar or str(parameter.display_type(context)).strip("<>")
    value = "" if argument or parameter.is_bool_flag else f"`{kind}`"
    help = parameter.help or ""
    if parameter.required:
        help += " Required."
    if getattr(parameter, "multiple", False) and "epeat" not in help:
        help += " Repeatable."
    if parameter.envvar:
        help += f" Environment: `{parameter.envvar}`."
    return [f"`{parameter.display_name_raw}`" if argument else names, value, _cell(help), _default(parameter)]


def _default(parameter: Any) -> str:
    shown = getattr(parameter, "show_default", True)
    if isinstance(shown, str):
        return _cell(shown)
    default = parameter.default
    if parameter.required or callable(default) or default in (None, "", [], ()) or shown is False or default is False:
        return " "
    if default is True:
        return f"`{parameter.opts[0]}`"
    return f"`{_cell(default)}`"


# ---- settings, report, metrics -------------------------------------------------------------------------------------


def recipe() -> str:
    """Return the settings of `Recipe` and `RunOptions` as tables."""
    from toolkit.quantize.recipe import Recipe, RunOptions

    parts = []
    for model in (Recipe, RunOptions):
        rows = []
        for name, field in model.model_fields.items():
            option = next(each for each in field.metadata if hasattr(each, "help"))
            rows.append([f"`{name}`", f"`{field.get_default()!r}`", _cell(option.help)])
        parts += [f"**{model.__name__}**: {_cell((model.__doc__ or '').splitlines()[0])}"]
        parts += [_table(["setting", "default", ""], rows)]
    return "\n\n".join(parts)


def report() -> str:
    """Return the schema of report.json, an object a section, as tables."""
    from bench.report.schema import Report

    schema = Report.model_json_schema()
    parts = []
    for name, shape in {"Report": schema, **schema.get("$defs", {})}.items():
        said, _, attributes = (shape.get("description") or "").partition("Attributes:")
        parts.append(f"## {name}")
        parts += list(_paragraphs(said.replace("`", ""))) if said.strip() else []
        if "enum" in shape:
            parts.append(", ".join(f"`{value}`" for value in shape["enum"]))
            continue
        meanings = dict(re.findall(r"^ +(\w+): (.+(?:\n {8,}.+)*)$", attributes, re.MULTILINE))
        rows = [
            [f"`{field}`", _kind(what), "" if field in shape.get("required", ()) else "may be absent",
             _cell(meanings.get(field, ""))]
            for field, what in shape.get("properties", {}).items()
        ]  # fmt: skip
        parts.append(_table(["field", "type", "", ""], rows))
    return "\n\n".join(parts)


def _kind(what: dict[str, Any]) -> str:
    if "$ref" in what:
        name = what["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in what:
        return " or ".join(_kind(each) for each in what["anyOf"])
    if "enum" in what or "const" in what:
        return ", ".join(f"`{value}`" for value in what.get("enum", [what.get("const")]))
    if what.get("type") == "array":
        return f"list of {_kind(what.get('items', {}))}"
    if what.get("type") == "object" and isinstance(what.get("additionalProperties"), dict):
        return f"object of {_kind(what['additionalProperties'])}"
    return str(what.get("type", "any"))


def metrics() -> str:
    """Return the metrics that a server of `qvl serve` adds to vLLM's own, from where the code makes them."""
    rows = []
    for path in sorted((ROOT / "serve").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id not in ("Counter", "Gauge", "Histogram") or not isinstance(node.args[0], ast.Constant):
                continue
            name, help, labels = (*(ast.literal_eval(each) for each in node.args[:3]), [])[:3]
            if node.func.id == "Counter" and not name.endswith("_total"):
                name += "_total"  # as prometheus_client writes it
            rows.append([f"`{name}`", node.func.id.lower(), ", ".join(f"`{each}`" for each in labels), _cell(help)])
    return _table(["metric", "type", "labels", ""], sorted(rows))


# ---- examples ------------------------------------------------------------------------------------------------------


def examples() -> str:
    """Return the table of examples/README.md, and the scripts: the site can't link to files of the checkout."""
    rows = [line for line in (ROOT / "examples" / "README.md").read_text().splitlines() if line.startswith("|")]
    parts = ["\n".join(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"`\1`", row) for row in rows)]
    for script in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {script.name}", f"```python\n{script.read_text().rstrip()}\n```"]
    return "\n\n".join(parts)


#: What a page can ask for.
GENERATED: dict[str, Callable[[], str]] = {
    "command_line": command_line,
    "examples": examples,
    "metrics": metrics,
    "recipe": recipe,
    "report": report,
}


# ---- mkdocs' events ------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that show files at the root."""
    from mkdocs.structure.files import File

    for page, source in COPIES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what is generated; make links that leave the site plain text."""
    text = _MARK.sub(lambda found: GENERATED[found[1]](), markdown)
    here = Path(page.file.src_uri).parent
    return _LINK.sub(lambda found: _inside(found, here), text)


def _inside(found: re.Match[str], here: Path) -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    parts: list[str] = []
    for part in (here / target).parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    copied = {f"../{source}": page for page, source in COPIES.items()}
    path = "/".join(parts)
    if path in copied:
        up = "../" * (len(here.parts))
        return f"[{text}]({up}{copied[path]}{anchor})"
    return found[0] if parts[:1] != [".."] else text
