"""The layers hold: who may import whom, and what may be used only in one place. Reads the source, imports nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("library", "networks", "tools", "finetune")
PLUGINS = "networks"

LAYERS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (
        4,
        (
            "library.app",
            "library.assembly",
            "library.cache_tools",
            "library.caching",
            "library.record",
            "library.run_data",
            "library.inspection",
            "library.observing",
            "library.placing",
            "library.stepping",
            "library.option_docs",
        ),
    ),
    (3, ("library.train", "library.methods", "library.generate")),
    (2, ("library.families", "library.data", "library.sampling", "library.prompts", PLUGINS)),
    (1, ("library.models", "library.objectives", "library.epsilon", "library.noise_schedule", "library.samplers")),
    (0, ("library",)),
)
"""The first prefix that fits decides; whatever else lies in `library` is ground."""
SCRIPTS = 5

LIGHT = (
    "library.options",
    "library.option_groups",
    "library.log",
    "library.train.plan",
    "library.data.config",
    "library.data.buckets",
    "library.data.captions",
)
"""Modules that answer before anything heavy is imported."""
HEAVY = ("torch", "torchvision", "transformers", "diffusers", "accelerate", "numpy", "PIL", "cv2", "safetensors")

CODE_RUNNERS = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
VAGUE = {"utils", "util", "common", "helper", "helpers", "misc"}
MAY_NAME_FAMILIES = ("library.app", "library.cache_tools", "library.assembly", "library.generate", "library.families")


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """What a relative import of one dot starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def at(self, node: ast.AST) -> str:
        """Place of a node, for messages."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)}"


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: Module
    node: ast.stmt
    target: str
    typing_only: bool
    """Inside `if TYPE_CHECKING`."""
    deferred: bool
    """Inside a function."""


def read(path: Path) -> Module:
    """The module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


@cache
def modules() -> tuple[Module, ...]:
    """All modules of the packages, and the scripts."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return tuple(read(path) for path in [*files, *sorted(ROOT.glob("*.py"))])


def known_names() -> frozenset[str]:
    """Names of all modules."""
    return frozenset(module.name for module in modules())


def inside(name: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


def layer(name: str) -> int:
    """Layer of a module of ours."""
    if name in tools_of_plugins():
        return SCRIPTS
    for number, prefixes in LAYERS:
        if any(inside(name, prefix) for prefix in prefixes):
            return number
    return SCRIPTS


@cache
def tools_of_plugins() -> frozenset[str]:
    """The scripts that lie beside the plug-ins."""
    return frozenset(
        module.name
        for module in modules()
        if inside(module.name, PLUGINS)
        and any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in module.tree.body)
    )


def branch(name: str) -> str:
    """What is a sibling of what: the package below `library`, or the top-level package."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "library" and len(parts) > 2 else name


def siblings(one: str, other: str) -> bool:
    """Whether two modules lie in the same package (a package counts as one of its own)."""
    if one.split(".")[0] == other.split(".")[0] != "library":
        return True
    return branch(one) == branch(other) or inside(one, other) or inside(other, one)


def targets(module: Module, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules that an import statement names; `from package import module` gives the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        start = module.package.split(".")
        start = start[: len(start) - (node.level - 1)]
        base = ".".join([*start, *([base] if base else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in known_names() else base


def imports(module: Module) -> Iterator[Import]:
    """All imports of a module, wherever they stand."""

    def walk(node: ast.AST, typing_only: bool, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(module, node):
                yield Import(module, node, target, typing_only, deferred)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, True, deferred)
            for child in node.orelse:
                yield from walk(child, typing_only, deferred)
        else:
            deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, typing_only, deferred)

    yield from walk(module.tree, False, False)


@cache
def all_imports() -> tuple[Import, ...]:
    """The imports of all modules."""
    return tuple(found for module in modules() for found in imports(module))


def ours(found: Import) -> bool:
    """Whether the imported module belongs to this project."""
    return found.target.split(".")[0] in {*PACKAGES, *(path.stem for path in ROOT.glob("*.py"))}


def said(found: Import) -> str:
    """An import, for messages."""
    return f"{found.module.at(found.node)}: {found.module.name} imports {found.target}"


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Calls, with the dotted name of what is called."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def none(problems: list[str]) -> None:
    """Fails with all problems, one a line."""
    assert not problems, "\n" + "\n".join(problems)


def test_imports_point_down_or_to_a_sibling() -> None:
    none(
        [
            said(found)
            for found in all_imports()
            if ours(found)
            and not found.typing_only
            and not siblings(found.module.name, found.target)
            and layer(found.target) >= layer(found.module.name)
            and not (layer(found.module.name) == layer(found.target) == 0)
            and not (layer(found.module.name) == layer(found.target) == 4)
            and not (layer(found.module.name) == layer(found.target) == 3 and found.target.endswith(".base"))
            and not allowed_across(found)
        ]
    )


def allowed_across(found: Import) -> bool:
    """Pairs of one layer that may meet: sampling serves prompts, and previews and generation use the run's parts."""
    one, other = found.module.name, found.target
    same_layer = layer(one) == layer(other)
    if not same_layer:
        return False
    if layer(one) == 1:
        return True
    return layer(one) == 2 and {one, other} <= {"library.sampling", "library.prompts"}


def test_data_never_imports_families() -> None:
    none([said(i) for i in all_imports() if inside(i.module.name, "library.data") and "library.families" in i.target])


def test_networks_stand_on_mathematics_and_ground_only() -> None:
    none(
        [
            said(found)
            for found in all_imports()
            if inside(found.module.name, PLUGINS)
            and layer(found.module.name) != SCRIPTS
            and ours(found)
            and not inside(found.target, PLUGINS)
            and layer(found.target) > 1
        ]
    )


def test_only_the_adapter_method_and_entry_points_know_plug_ins() -> None:
    allowed = (PLUGINS, "library.methods.adapter", "library.generate", "library.app")
    none(
        [
            said(found)
            for found in all_imports()
            if inside(found.target, PLUGINS)
            and layer(found.module.name) != SCRIPTS
            and not any(inside(found.module.name, name) for name in allowed)
        ]
    )


def test_the_loop_knows_protocols_only() -> None:
    none(
        [
            said(found)
            for found in all_imports()
            if found.module.name == "library.train.loop"
            and ours(found)
            and not found.typing_only
            and layer(found.target)
        ]
    )


def test_the_loop_has_no_case_for_a_family_or_a_method() -> None:
    tree = next(module for module in modules() if module.name == "library.train.loop").tree
    conditions = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    none([text for text in conditions if "family" in text or "method" in text])


def test_concrete_families_are_named_by_assembly_generation_and_scripts_only() -> None:
    shared = {"library.families", "library.families.base", "library.families.tokenizers"}
    none(
        [
            said(found)
            for found in all_imports()
            if inside(found.target, "library.families")
            and found.target not in shared
            and layer(found.module.name) != SCRIPTS
            and not any(inside(found.module.name, name) for name in MAY_NAME_FAMILIES)
        ]
    )


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    reached, waiting = set(), [name]
    problems = []
    by_module: dict[str, list[Import]] = {}
    for found in all_imports():
        by_module.setdefault(found.module.name, []).append(found)
    assert name in by_module, f"{name} is gone"
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        for found in by_module.get(current, []):
            if found.typing_only or found.deferred:
                continue
            if found.target.split(".")[0] in HEAVY:
                problems.append(f"{name} reaches {said(found)}")
            elif ours(found):
                waiting.append(found.target)
    none(problems)


def test_scripts_import_nothing_heavy_before_they_parse() -> None:
    scripts = [module for module in modules() if layer(module.name) == SCRIPTS and module.path.name != "__init__.py"]
    assert scripts
    none(
        [
            said(found)
            for found in all_imports()
            if found.module in scripts and not found.deferred and found.target.split(".")[0] in HEAVY
        ]
    )


def test_cuda_is_named_in_two_modules_only() -> None:
    none(
        [
            module.at(node)
            for module in modules()
            if module.name not in ("library.devices", "library.recording")
            for node in ast.walk(module.tree)
            if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"))
            or (isinstance(node, ast.Import | ast.ImportFrom) and "torch.cuda" in ast.unparse(node))
        ]
    )


def test_nothing_that_is_read_can_run_code() -> None:
    problems = [said(found) for found in all_imports() if found.target.split(".")[0] in UNPICKLERS]
    for module in modules():
        problems += [
            f"{module.at(node)}: {name}"
            for node, name in calls(module)
            if name in CODE_RUNNERS or (name in ("torch.load", "np.load") and not safe_numpy(node, name))
        ]
    none(problems)


def safe_numpy(node: ast.Call, name: str) -> bool:
    """Whether an array is read with pickles switched off (numpy's default, but said)."""
    switched_off = any(key.arg == "allow_pickle" and ast.unparse(key.value) == "False" for key in node.keywords)
    return name == "np.load" and switched_off


def test_no_module_has_a_vague_name() -> None:
    none([module.name for module in modules() if VAGUE & set(module.name.split("."))])


def test_text_is_read_and_written_with_an_encoding() -> None:
    none([f"{module.at(node)}: {name}" for module in modules() for node, name in calls(module) if needs_encoding(node)])


def needs_encoding(node: ast.Call) -> bool:
    """Whether a call opens text in whatever the locale's encoding is."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if any(key.arg in ("encoding", None) for key in node.keywords):
        return False
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if owner in ("files", "AdapterFile", "os", "Image", "webbrowser", "zipfile", "tarfile"):
        return False
    match name:
        case "read_text":
            return len(node.args) < 1
        case "write_text":
            return len(node.args) < 2
        case "open":
            mode_at = 0 if owner and owner != "io" else 1
            mode = [*node.args[mode_at : mode_at + 1], *(key.value for key in node.keywords if key.arg == "mode")]
            return not (mode and "b" in ast.unparse(mode[0]))
        case _:
            return False


def test_prints_are_command_line_output_only() -> None:
    none(
        [
            f"{module.at(node)}: print"
            for module in modules()
            if layer(module.name) < 4
            for node, name in calls(module)
            if name == "print"
        ]
    )


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open('w')", True),
        ("path.open(mode='wb')", False),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
    ],
)
def test_the_check_for_encodings_sees_them(code: str, wrong: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert needs_encoding(call) == wrong


def test_the_checks_see_imports_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
from library.data import buckets
if TYPE_CHECKING:
    import torch
def later():
    from ..families import flux
"""
    module = Module("library.data.x", ROOT / "library" / "data" / "x.py", ast.parse(source))
    found = {found.target: (found.typing_only, found.deferred) for found in imports(module)}
    assert found["library.data.buckets"] == (False, False)
    assert found["torch"] == (True, False)
    assert found["library.families.flux"] == (False, True)
    assert not siblings("library.data.x", "library.families.flux")
    assert siblings("library.data.x", "library.data.buckets")
    assert layer("library.models.flux") < layer("library.data.x") < layer("library.train.loop") < layer("flux_train")
