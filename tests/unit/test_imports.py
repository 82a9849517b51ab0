"""What an import costs: `qvl --help` loads nothing heavy, torch is loaded by modules whose subject is tensors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("bench", "serve", "toolkit")
#: Take a second or more each, and no verb needs them before its options are read.
HEAVY = (
    "accelerate",
    "awq",
    "matplotlib",
    "peft",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
    "vllm",
)
#: Of ours, and heavy by what they load or compute.
OURS = (
    "bench.report",
    "bench.run.measure",
    "bench.run.session",
    "serve.process",
    "toolkit.demo",
    "toolkit.quantize.run",
    "toolkit.quantize.worker",
)
#: Settings, of which the command line is made: light, wherever they are.
SETTINGS = ("toolkit.quantize", "toolkit.quantize.recipe")
#: Packages that load torch when they are imported.
TORCH = (
    "accelerate",
    "awq",
    "peft",
    "qwen_vl_utils",
    "safetensors.torch",
    "torch",
    "torchvision",
    "transformers",
    "vllm",
)
#: Modules that load torch when they are imported: tensors are their subject.
TENSORS = {
    "bench.micro.test_compensate",
    "bench.micro.test_kernels",
    "bench.micro.test_search",
    "bench.studies.kernels",
    "bench.studies.kernels_beside",
    "bench.studies.quantizer.errors",
    "bench.studies.quantizer.quality",
    "bench.studies.quantizer.stock",
    "bench.studies.real_lm.score",
    "bench.studies.real_lm.study",
    "bench.verify.reference",
    "bench.verify.run",
    "serve.kernels.driver",
    "serve.kernels.linear",
    "serve.kernels.product",
    "serve.kernels.unpacked",
    "serve.kernels.words",
    "toolkit.demo.fidelity",
    "toolkit.demo.gallery",  # only by what it imports
    "toolkit.demo.learn",
    "toolkit.demo.model",
    "toolkit.demo.optim",
    "toolkit.demo.quiz",
    "toolkit.fidelity.answers",
    "toolkit.formats.linears",
    "toolkit.formats.packing",
    "toolkit.formats.reference",
    "toolkit.quantize.cost",
    "toolkit.quantize.distillation.divergence",
    "toolkit.quantize.distillation.layers",
    "toolkit.quantize.distillation.lessons",
    "toolkit.quantize.distillation.linear",
    "toolkit.quantize.distillation.stage",
    "toolkit.quantize.distillation.train",
    "toolkit.quantize.layer",
    "toolkit.quantize.layer_writer",
    "toolkit.quantize.replay",
    "toolkit.quantize.search.autoawq",
    "toolkit.quantize.search.chained",
    "toolkit.quantize.search.clips",
    "toolkit.quantize.search.compensate",
    "toolkit.quantize.search.descent",
    "toolkit.quantize.search.gram",
    "toolkit.quantize.search.grid",
    "toolkit.quantize.search.head",
    "toolkit.quantize.search.kernels.clip",
    "toolkit.quantize.search.kernels.compensate",
    "toolkit.quantize.search.kernels.rounding",
    "toolkit.quantize.search.kernels.trust",
    "toolkit.quantize.search.moments",
    "toolkit.quantize.search.nearest",
    "toolkit.quantize.search.rounding",
    "toolkit.quantize.search.scales",
    "toolkit.quantize.search.sensitivity",
    "toolkit.quantize.search.strategy",
    "toolkit.quantize.search.tower",
    "toolkit.quantize.stream.layers",
    "toolkit.quantize.stream.paired",
    "toolkit.quantize.stream.passing",
    "toolkit.quantize.stream.shell",
    "toolkit.quantize.stream.states",
    "toolkit.quantize.stream.tower",
}


def test_the_command_line_loads_nothing_heavy() -> None:
    """In a process of its own: this one has loaded everything."""
    program = "import json, sys, toolkit.cli; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(ran.stdout)
    assert "toolkit.verbs" in loaded
    assert not [name for name in loaded if _is_in(name, HEAVY + OURS) and name not in SETTINGS]


def test_torch_is_loaded_where_tensors_are_the_subject() -> None:
    """The list above is what its comment says, no less either: an entry that no longer holds is taken out."""
    assert _loading_torch() == TENSORS


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _modules() -> dict[str, Path]:
    """Our modules by name; a package's is its __init__.py."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def _loading_torch() -> set[str]:
    """Return our modules that load torch when imported: themselves, by their packages or by what they import."""
    ours = _modules()
    loads = {name: {*_parents(name), *_imported(path)} for name, path in ours.items()}
    found = {name for name, wanted in loads.items() if any(_is_in(module, TORCH) for module in wanted)}
    while True:
        # `from package import name`: a module of that name, else something inside the package
        more = {
            name for name, wanted in loads.items() if {w if w in ours else w.rpartition(".")[0] for w in wanted} & found
        }
        if more <= found:
            return found
        found |= more


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _imported(path: Path) -> Iterator[str]:
    """Yield what a module imports while it is imported: not in functions, not for type checkers alone."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def imports_transformers(tree: ast.AST) -> bool:
    """Whether a module imports transformers when it runs; what type checkers alone read does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "transformers" for name in names) or imports_transformers(node):
            return True
    return False


def test_who_imports_transformers_patches_torchvision_before() -> None:
    """Else it works where another module did so earlier, and a test file that runs alone fails."""
    # mixed: toolkit.demo.fidelity.load has done it; conftest of e2e: vLLM's process
    known = {"tests/e2e/test_mixed.py", "serve/app/server.py"}
    files = [
        path for folder in (*PACKAGES, "tests/unit", "tests/e2e") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    missing = [
        name
        for name, text in texts.items()
        if "transformers" in text and "patch_torchvision()" not in text and imports_transformers(ast.parse(text))
    ]
    assert set(missing) <= known
