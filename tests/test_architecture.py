"""Imports point one way: which folder of the package may use which other one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lclseg"
# Arrays in, arrays out.
LEAVES = {
    f"lclseg.{name}"
    for name in (
        "augment",
        "class_groups",
        "components",
        "components_2d",
        "convolution",
        "cores",
        "crf",
        "losses",
        "metrics",
        "mixing",
        "models",
        "palette",
        "random_keys",
        "rules",
        "through_plane",
    )
}
MATHEMATICS = LEAVES - {
    f"lclseg.{name}"
    for name in ("class_groups", "cores", "models", "palette", "random_keys", "rules")
}
SHARED_BY_METHODS = {
    "lclseg.methods.base",
    "lclseg.methods.contract",
    "lclseg.data.batches",
}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source):
    """What a source imports, anywhere in it: modules in full, names of ours with their module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_of(name):
    """Modules of the package that one of them imports; a name imported from one counts as it."""
    found = set()
    for imported in imports(MODULES[name].read_text()):
        if imported in MODULES:
            found.add(imported)
        elif (module := imported.rpartition(".")[0]) in MODULES:
            found.add(module)
        else:
            assert not imported.startswith("lclseg"), f"{name} imports {imported}, which is none"
    return found


def within(folder):
    return [m for m in MODULES if m.startswith(f"lclseg.{folder}.")]


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\ndef f():\n    from c.d import e, g as h\n"
    assert imports(source) == {"a.b", "c.d.e", "c.d.g"}
    assert "lclseg.losses" in modules_of("lclseg.methods.base")
    assert "lclseg.methods.contract" in modules_of("lclseg.steps")
    assert len(within("data")) > 5 and len(within("methods")) > 3


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_nothing_of_ours_but_leaves_and_see_no_config(name):
    assert modules_of(name) <= LEAVES
    assert not any(i.startswith("ml_collections") for i in imports(MODULES[name].read_text()))


@pytest.mark.parametrize("name", within("methods"))
def test_methods_import_leaves_and_their_contract_only(name):
    """So one file tells a method whole, and none leans on another."""
    assert modules_of(name) <= LEAVES | SHARED_BY_METHODS


@pytest.mark.parametrize("name", ["lclseg.train", "lclseg.steps", *within("run")])
def test_training_names_no_method(name):
    """But for supervised training, the first stage of most, where programs are compiled."""
    allowed = SHARED_BY_METHODS | (
        {"lclseg.methods.supervised"} if name.endswith("programs") else set()
    )
    assert {m for m in modules_of(name) if m.startswith("lclseg.methods")} <= allowed
    if name.endswith("stored_config"):  # it knows the one method that there was before methods
        return
    text = MODULES[name].read_text()
    for method in within("methods"):
        if method not in SHARED_BY_METHODS | {"lclseg.methods.supervised"}:
            assert f'"{method.rpartition(".")[2]}"' not in text


@pytest.mark.parametrize("name", within("run"))
def test_what_keeps_a_run_alive_has_no_mathematics(name):
    """The mark of pixels without a label is the only thing it takes from there."""
    for imported in imports(MODULES[name].read_text()) - {"lclseg.losses.IGNORE"}:
        assert imported not in MATHEMATICS
        assert imported.rpartition(".")[0] not in MATHEMATICS


@pytest.mark.parametrize("name", [*within("data"), *within("methods"), *within("run")])
def test_pages_show_what_a_run_has_written_and_no_run_needs_them(name):
    assert not any(module.startswith("lclseg.page.") for module in modules_of(name))


# What must not be loaded, however indirectly, where modules are imported in a process of their own.
@pytest.mark.parametrize(
    ("folder", "unwanted"),
    [
        ("data", ("jax", "flax", "optax", "orbax", "lclseg.run", "lclseg.losses")),
        ("page", ("flax", "optax", "orbax", "lclseg.train", "lclseg.steps", "lclseg.methods")),
    ],
)
def test_a_folder_loads_nothing_that_it_must_not(folder, unwanted):
    code = f"""
import importlib, sys
for name in {within(folder)}:
    importlib.import_module(name)
unwanted = {unwanted}
print([m for m in sys.modules if m in unwanted or m.startswith(tuple(u + "." for u in unwanted))])
"""
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == "[]"
