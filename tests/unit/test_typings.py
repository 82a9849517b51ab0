"""The stubs under typings/ say what is installed: each name is there, and what a stub lets be passed is taken.

vLLM's part is compared with its source, since importing it takes 12 s.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from toolkit.compat import patch_torchvision
from toolkit.paths import demo_checkpoint

TYPINGS = ROOT / "typings"
STUBS = sorted(
    ".".join(path.relative_to(TYPINGS).with_suffix("").parts).removesuffix(".__init__")
    for path in TYPINGS.rglob("*.pyi")
    if path.stat().st_size
)
#: Classes whose attributes only objects have, or that the stub names and the package does not.
OBJECTS: dict[str, Callable[[], Any]] = {
    "transformers.Qwen2VLConfig": lambda: _model().config,
    "transformers.Qwen2VLTextConfig": lambda: _model().config.text_config,
    "transformers.Qwen2VLForConditionalGeneration": lambda: _model(),
    "transformers.Qwen2VLModel": lambda: _model().model,
    "transformers.Qwen2VLTextModel": lambda: _model().model.language_model,
    "transformers._VisionTower": lambda: _model().model.visual,
    "transformers._PatchEmbed": lambda: _model().model.visual.patch_embed,
    "transformers.PreTrainedConfig": lambda: _model().config,
    "transformers.PreTrainedModel": lambda: _model(),
    "transformers._Output": lambda: (
        _installed("transformers.models.qwen2_vl.modeling_qwen2_vl").Qwen2VLCausalLMOutputWithPast
    ),
    "transformers.Qwen2VLProcessor": lambda: _processor(),
    "transformers.Qwen2VLImageProcessor": lambda: _processor().image_processor,
    "transformers.PreTrainedTokenizerBase": lambda: _processor().tokenizer,
    # peft forwards what it does not know to the tuner inside
    "peft.PeftModel": lambda: type(
        "Forwarding",
        (_installed("peft").PeftModel,),
        {"merge_and_unload": _installed("peft.tuners.tuners_utils").BaseTuner.merge_and_unload},
    ),
    "safetensors._Slice": lambda: _slice(),
    "awq.quantize.quantizer.AwqQuantizer": lambda: _assigned_in_init(_installed("awq.quantize.quantizer").AwqQuantizer),
    "awq.models.base.BaseAWQForCausalLM": lambda: _assigned_in_init(
        _installed("awq.models.base").BaseAWQForCausalLM, "quantizer"
    ),
}
#: Methods whose parameters another one takes: torch's __call__ hands everything on.
CALLS = {
    "transformers.Qwen2VLForConditionalGeneration": "forward",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer": "forward",
}


@cache
def _installed(module: str) -> Any:
    patch_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


@cache
def _model() -> Any:
    """The embedded model's modules, without memory for their weights."""
    import torch

    transformers = _installed("transformers")
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.from_pretrained(demo_checkpoint())
        )


@cache
def _processor() -> Any:
    return _installed("transformers").AutoProcessor.from_pretrained(demo_checkpoint())


def _slice() -> Any:
    with _installed("safetensors").safe_open(demo_checkpoint() / "model.safetensors", framework="pt") as file:
        return file.get_slice(file.keys()[0])


def _assigned_in_init(cls: type, *later: str) -> type:
    """Return the class with the attributes that its constructor, or a later call, gives to its objects."""
    source = inspect.getsource(cls)
    names = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert names.issuperset(later)
    return type(cls.__name__, (cls,), dict.fromkeys(names - set(vars(cls))))


def _stub(module: str) -> ast.Module:
    path = TYPINGS / Path(*module.split("."))
    path = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".pyi")
    return ast.parse(path.read_text(encoding="utf-8"))


def _misfits(stub: ast.FunctionDef, real: Any, *, method: bool) -> Iterator[str]:
    """Yield what is wrong with a stub's parameters."""
    try:
        # a classmethod that is a copy of another one says it wraps the bound original, which has no cls
        whole = isinstance(real, classmethod)
        function = real.__func__ if isinstance(real, classmethod) else real
        parameters = list(inspect.signature(function, follow_wrapped=not whole).parameters.values())
    except ValueError:  # compiled, and does not say
        return
    kinds = inspect.Parameter
    names = {p.name: p for p in parameters}
    extra = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    by_position = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    given = stub.args
    positional = [a.arg for a in (*given.posonlyargs, *given.args)][1 if method else 0 :]
    if method and by_position and by_position[0] in ("self", "cls"):
        by_position = by_position[1:]
    rest = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    if positional != by_position[: len(positional)] and not rest:
        yield f"positional {positional}, installed {by_position}"
    for name in (a.arg for a in given.kwonlyargs):
        if name not in names and not extra:
            yield f"no parameter {name}"
    required = [
        p.name
        for p in parameters
        if p.default is kinds.empty and p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    for name in required:
        if name not in {*positional, *(a.arg for a in given.kwonlyargs), "self", "cls"}:
            yield f"{name} is needed"


def _class_misfits(where: str, stub: ast.ClassDef, real: Any) -> Iterator[str]:
    for node in stub.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not _has(real, node.target.id):
                yield f"{where} has no {node.target.id}"
        elif isinstance(node, ast.FunctionDef):
            name = CALLS.get(where, node.name) if node.name == "__call__" else node.name
            if not _has(real, name):
                yield f"{where} has no {name}"
                continue
            decorators = {ast.unparse(d) for d in node.decorator_list}
            if decorators & {"property"} or any(d.endswith(".setter") for d in decorators):
                continue
            member = inspect.getattr_static(real if isinstance(real, type) else type(real), name, None)
            if name == "__init__":
                member = real if isinstance(real, type) else type(real)
            elif isinstance(member, staticmethod):
                member = getattr(real, name)
            for problem in _misfits(node, member, method="staticmethod" not in decorators):
                yield f"{where}.{name}: {problem}"


def _has(real: Any, name: str) -> bool:
    return hasattr(real, name) or name in getattr(real, "__annotations__", {})


def _installed_misfits(module: str) -> Iterator[str]:
    package = _installed(module)
    for node in _stub(module).body:
        if isinstance(node, ast.ClassDef):
            where = f"{module}.{node.name}"
            if not node.name.startswith("_") and not hasattr(package, node.name):
                yield f"{module} has no {node.name}"
                continue
            real = OBJECTS[where]() if where in OBJECTS else getattr(package, node.name)
            yield from _class_misfits(where, node, real)
        elif isinstance(node, ast.FunctionDef):
            if not hasattr(package, node.name):
                yield f"{module} has no {node.name}"
                continue
            yield from (f"{module}.{node.name}: {p}" for p in _misfits(node, getattr(package, node.name), method=False))
        elif isinstance(node, ast.AnnAssign) and not hasattr(package, ast.unparse(node.target)):
            yield f"{module} has no {ast.unparse(node.target)}"


@pytest.mark.slow
@pytest.mark.parametrize("module", [name for name in STUBS if not name.startswith("vllm")])
def test_a_stub_says_what_is_installed(module: str) -> None:
    """Names and parameters, against the imported package."""
    assert list(_installed_misfits(module)) == []


@pytest.mark.parametrize("module", [name for name in STUBS if name.startswith("vllm")])
def test_a_stub_says_what_vllm_has(module: str) -> None:
    """Names and positional parameters, against vLLM's source."""
    spec = importlib.util.find_spec("vllm")  # finds the package without importing it
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    real = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in _stub(module).body:
        if isinstance(node, ast.FunctionDef):
            assert [a.arg for a in node.args.args] == [a.arg for a in real[node.name].args.args]
        elif isinstance(node, ast.AnnAssign):
            assert ast.unparse(node.target) in real


def test_a_stub_that_is_wrong_is_told() -> None:
    """A name that is not there, a parameter that is not taken, one that is needed."""
    stub = ast.parse("class C:\n def gone(self) -> None: ...\n def f(self, a: int, *, c: int) -> None: ...").body[0]
    assert isinstance(stub, ast.ClassDef)

    class C:
        def f(self, a: int, b: int) -> None:
            """Nothing."""

    assert list(_class_misfits("C", stub, C)) == ["C has no gone", "C.f: no parameter c", "C.f: b is needed"]
