"""What setup.cfg declares against what the files need; run.sh with a stand-in for Python."""

import ast
import configparser
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lclseg

ROOT = Path(__file__).parents[1]
PACKAGES = ("lclseg", "tfds_builders")

# "name[extra]>=1.2,<2" and nothing else.
REQUIREMENT = re.compile(r"([\w.-]+)(\[\w+\])?>=(\d+(?:\.\d+)*),<(\d+(?:\.\d+)*)")


def lines(text):
    return [line for line in text.strip().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ROOT / "setup.cfg").read_text())
    return parser


def requirements(setup_cfg, *extras):
    found = lines(setup_cfg["options"]["install_requires"])
    for extra in extras:
        found += lines(setup_cfg["options.extras_require"][extra])
    return found


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def files_below(*folders):
    """Files of the project, not what Python leaves beside them."""
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    return [p for p in paths if "__pycache__" not in p.parts]


def imported_modules(folder):
    """Top-level module -> a file that imports it absolutely."""
    found = {}
    for path in files_below(folder):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return found


def test_every_folder_with_code_is_a_package_that_setup_cfg_finds(setup_cfg):
    patterns = lines(setup_cfg["options.packages.find"]["include"])
    folders = {p.parent for p in files_below(*PACKAGES) if p.suffix == ".py"}
    assert {ROOT / "lclseg", ROOT / "tfds_builders", ROOT / "tfds_builders/phantom"} <= folders
    for folder in folders:
        inner = folder
        while inner != ROOT:  # setuptools stops at the first folder that is no package
            assert (inner / "__init__.py").is_file(), f"{inner} has no __init__.py"
            inner = inner.parent
        name = ".".join(folder.relative_to(ROOT).parts)
        assert any(fnmatch.fnmatchcase(name, p) for p in patterns), name
    for other in ("configs", "tests", "benchmarks"):
        assert not any(fnmatch.fnmatchcase(other, p) for p in patterns)


def test_every_data_file_is_packaged(setup_cfg):
    patterns = lines(setup_cfg["options.package_data"]["*"])
    for path in files_below(*PACKAGES):
        if path.suffix != ".py":
            assert (path.parent / "__init__.py").is_file(), f"{path} is in no package"
            assert any(fnmatch.fnmatchcase(path.name, p) for p in patterns), path


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("lclseg", ()), ("tfds_builders", ()), ("configs", ()), ("tests", ("test", "oracle"))],
)
def test_every_import_is_declared(folder, extras, setup_cfg):
    declared = {normal(REQUIREMENT.match(r)[1]) for r in requirements(setup_cfg, *extras)}
    # Where the oracle does not build (setup.cfg), nothing installed tells whose module it is.
    distributions = {"pydensecrf": ["pydensecrf2"], **importlib.metadata.packages_distributions()}
    modules = imported_modules(folder)
    assert modules
    beside = {p.stem for p in (ROOT / folder).glob("*.py")}
    for module, path in modules.items():
        own = module in PACKAGES or module == "benchmarks" or module in beside
        if module in sys.stdlib_module_names or own:
            continue
        providers = {normal(d) for d in distributions.get(module, [module])}
        assert providers & declared, f"{path} imports {module}, of {providers}: not in setup.cfg"


def test_every_requirement_has_a_lower_and_an_upper_bound(setup_cfg):
    for requirement in requirements(setup_cfg, *setup_cfg["options.extras_require"]):
        match = REQUIREMENT.fullmatch(requirement)
        assert match, f"{requirement!r}; wanted name>=LOWER,<UPPER"
        lower, upper = ([int(n) for n in match[i].split(".")] for i in (3, 4))
        assert lower < upper, requirement


def test_jax_builds_have_the_bounds_of_jax(setup_cfg):
    (jax,) = (r for r in requirements(setup_cfg) if r.startswith("jax>"))
    for build in ("cuda12", "cuda13", "tpu"):
        assert lines(setup_cfg["options.extras_require"][build]) == [
            jax.replace("jax", f"jax[{build}]")
        ]


@pytest.mark.parametrize("folder", [*PACKAGES, "configs", "tests", "benchmarks"])
def test_tensorflow_is_imported_nowhere(folder):
    assert "tensorflow" not in imported_modules(folder)


def test_version_is_the_same_everywhere(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: lclseg.__version__"
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == lclseg.__version__


# Makes .venv with itself as its Python, and notes what it is asked to do.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "-c "*) exec {python} "$@" ;;
  "-m venv "*) mkdir -p .venv/bin; for p in python ruff mypy; do cp "$0" .venv/bin/$p; done ;;
esac
echo "$*" >>calls
echo "$GLIBC_TUNABLES" >tunables
if [[ "$*" == "-m pip"* && -e pip_fails ]]; then echo "no such package"; exit 1; fi
"""
TRAIN = "-m lclseg.main --config=configs/phantom.py"


@pytest.fixture
def run_sh(tmp_path):
    """run_sh(*arguments, **environment) -> (completed process, what Python was called with)."""
    for name in ("run.sh", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("phantom", "other"):
        (tmp_path / "configs" / f"{name}.py").touch()
    python = tmp_path / "stand_in"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("LCLSEG_JAX", "GLIBC_TUNABLES")}

    def run(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        process = subprocess.run(
            ["bash", tmp_path / "run.sh", *arguments],
            cwd="/",
            env={**clean, "PYTHON": str(python), **environment},
            capture_output=True,
            text=True,
        )
        return process, calls.read_text().splitlines()

    run.folder = tmp_path
    return run


def actions(calls):
    """The calls in short: venv, the target of each pip install, and the rest."""
    short = []
    for call in calls:
        if call.startswith("-m pip"):
            short.append("pip " + call.split()[-1])
        else:
            short.append("venv" if call == "-m venv .venv" else call)
    return short


def test_run_sh_parses():
    subprocess.run(["bash", "-n", ROOT / "run.sh"], check=True)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_run_sh_sets_up_once(run_sh):
    assert actions(run_sh()[1]) == ["venv", "pip .", TRAIN]
    assert actions(run_sh("--config.seed=3")[1]) == [f"{TRAIN} --config.seed=3"]
    assert actions(run_sh("configs/other.py:x", "--workdir=a b")[1]) == [
        "-m lclseg.main --config=configs/other.py:x --workdir=a b"
    ]


def test_run_sh_asks_for_huge_pages_unless_told_otherwise(run_sh):
    run_sh()
    assert (run_sh.folder / "tunables").read_text() == "glibc.malloc.hugetlb=1\n"
    run_sh(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert (run_sh.folder / "tunables").read_text() == "glibc.malloc.hugetlb=0\n"


def test_run_sh_adds_the_test_packages_to_what_is_there(run_sh):
    run_sh()
    checks = ["check .", "format --check .", "lclseg tfds_builders"]
    process, calls = run_sh("test", "-k", "x")
    assert process.returncode == 0
    assert actions(calls)[:-1] == ["pip .[test]", "pip .[oracle]", *checks]
    assert actions(calls)[-1].startswith("-m pytest") and actions(calls)[-1].endswith("-k x")
    assert actions(run_sh("test")[1])[:-1] == checks
    assert actions(run_sh()[1]) == [TRAIN]


def test_run_sh_makes_another_environment_for_another_jax(run_sh):
    run_sh()
    assert actions(run_sh(LCLSEG_JAX="cuda12")[1]) == ["venv", "pip .[cuda12]", TRAIN]
    assert actions(run_sh("test", LCLSEG_JAX="cuda12")[1])[0] == "pip .[cuda12,test]"
    assert actions(run_sh(LCLSEG_JAX="cpu")[1]) == ["venv", "pip .", TRAIN]


def test_run_sh_installs_again_when_the_requirements_change(run_sh):
    run_sh("test")
    with open(run_sh.folder / "setup.cfg", "a") as file:
        file.write("# changed\n")
    assert actions(run_sh()[1]) == ["pip .", TRAIN]
    assert actions(run_sh("test")[1])[0] == "pip .[test]"


def test_run_sh_starts_afresh_after_a_set_up_that_failed(run_sh):
    (run_sh.folder / "pip_fails").touch()
    for _ in range(2):
        process, calls = run_sh()
        assert process.returncode == 1 and "no such package" in process.stderr
        assert actions(calls) == ["venv", "pip ."]
    (run_sh.folder / "pip_fails").unlink()
    assert actions(run_sh()[1]) == ["venv", "pip .", TRAIN]


def test_run_sh_keeps_an_environment_made_by_hand(run_sh):
    binaries = run_sh.folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shutil.copy(run_sh.folder / "stand_in", binaries / "python")
    assert actions(run_sh()[1]) == ["pip .", TRAIN]
    assert actions(run_sh()[1]) == [TRAIN]


def test_run_sh_tests_without_the_oracle_where_it_does_not_build(run_sh):
    stand_in = run_sh.folder / "stand_in"
    stand_in.write_text(stand_in.read_text() + 'if [[ "$*" == *oracle* ]]; then exit 1; fi\n')
    process, calls = run_sh("test")
    assert process.returncode == 0 and "tests against it are skipped" in process.stderr
    assert actions(calls)[-1].startswith("-m pytest")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"LCLSEG_JAX": "rocm"}, "LCLSEG_JAX is 'rocm'; wanted cpu, cuda12, cuda13 or tpu"),
        ((), {"PYTHON": "false"}, "no Python 3.11 or newer (tried false)"),
        (("configs/none.py",), {}, "no config file configs/none.py"),
    ],
)
def test_run_sh_refuses(run_sh, arguments, environment, message):
    process, calls = run_sh(*arguments, **environment)
    assert process.returncode == 1 and message in process.stderr
    assert not calls and not (run_sh.folder / ".venv").exists()


@pytest.mark.parametrize(("tool", "first"), [("ruff", "check"), ("mypy", "lclseg")])
def test_run_sh_passes_on_the_exit_status(run_sh, tool, first):
    run_sh("test")
    python = run_sh.folder / ".venv" / "bin" / "python"
    python.write_text(python.read_text() + 'if [[ "$*" == "-m pytest"* ]]; then exit 3; fi\n')
    assert run_sh("test")[0].returncode == 3
    check = run_sh.folder / ".venv" / "bin" / tool
    check.write_text(f'#!/usr/bin/env bash\nif [[ "$1" == {first} ]]; then exit 1; fi\n')
    shutil.copy(run_sh.folder / "stand_in", python)
    assert run_sh("test")[0].returncode == 1


# Stands for a Python: its version is as asked for or not, and it notes what it is called with.
OTHER = """#!/usr/bin/env bash
case "$*" in
  "-c "*) [[ "$*" == *"!= '{version}'"* ]] ;;
  "--version") echo "Python {version}" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip list"*) echo "jax 1.0" ;;
esac
status=$?
echo "{version} $*" >>"$CALLS"
exit "$status"
"""


@pytest.fixture
def ci_run(tmp_path):
    """ci_run(first, active, pyenv) -> (process, calls of the second Python).

    `first` is the version in .venv; `active` and `pyenv` are those found on PATH and by pyenv.
    """
    checkout, programs, root = (tmp_path / name for name in ("checkout", "bin", "pyenv"))
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(first, active=(), pyenv=()):
        write(checkout / "run.sh", "#!/usr/bin/env bash\necho tested\n")
        write(checkout / ".venv/bin/python", f"#!/usr/bin/env bash\necho {first}\n")
        for version in ("3.11", "3.12", "3.13"):  # as pyenv's shims: there, with nothing behind
            none = "#!/usr/bin/env bash\nexit 127\n"
            text = OTHER.format(version=version) if version in active else none
            write(programs / f"python{version}", text)
        for version in pyenv:
            write(root / "versions" / f"{version}.1/bin/python", OTHER.format(version=version))
        write(programs / "pyenv", f"#!/usr/bin/env bash\necho {root}\n")
        calls = tmp_path / "calls"
        calls.write_text("")
        process = subprocess.run(
            ["bash", checkout / ".ci" / "run"],
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)},
            capture_output=True,
            text=True,
        )
        return process, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("first", "active", "pyenv", "second"),
    [
        ("3.11", ("3.11",), ("3.11", "3.12", "3.13"), "3.13"),
        ("3.11", ("3.11", "3.12"), (), "3.12"),
        ("3.13", ("3.13",), ("3.12", "3.13"), "3.12"),
    ],
)
def test_ci_runs_on_a_second_python(ci_run, first, active, pyenv, second):
    process, calls = ci_run(first, active, pyenv)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("tested")
    commands = [call for call in calls if call.startswith(f"{second} -m ")]
    wanted = ("-m venv ", "-m pip install ", "-m lclseg.main ", "-m pytest ")
    for start in wanted:
        assert any(call.startswith(f"{second} {start}") for call in commands), start
    assert not [call for call in calls if call.startswith(f"{first} -m ")]


def test_ci_says_that_there_is_no_second_python(ci_run):
    process, calls = ci_run("3.12", active=("3.12",), pyenv=("3.12",))
    assert process.returncode == 0 and "no other Python than 3.12" in process.stdout
    assert not [call for call in calls if " -m " in call]
