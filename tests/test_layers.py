"""Imports go downward only. The oracle is the list of layers, read against the syntax tree of every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("fedjax_lora_kernels",),
    ("core",),
    ("ops", "adapters", "tasks", "wireless", "sparsifiers", "aggregation"),
    ("models", "data", "control"),
    ("training",),
    ("sim",),
    ("planning",),
    ("config",),
    ("io",),
    ("report",),
    ("app",),
    ("methods", "testing"),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

SAME_LEVEL = {
    ("sparsifiers", "ops"),
    ("aggregation", "ops"),
    ("adapters", "ops"),
}
"""(importer, imported): the pairs of one level that may."""

VERSION_READERS = {"app"}
"""Who may import the root package, for its version."""


def imported_packages(module: str, source: str) -> set[str]:
    """Packages of the project that `module` imports, wherever in its source: `""` is the root package."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{origin}.{alias.name}" for alias in node.names]
    packages = set()
    for name in names:
        first, _, rest = name.partition(".")
        if first == "fedjax_lora_kernels":
            packages.add(first)
        elif first == "fedjax_lora":
            package = rest.split(".")[0]
            packages.add(package if package in LEVEL else "")
    return packages


def package_of(module: str) -> str:
    """The name that has a layer."""
    first, _, rest = module.partition(".")
    return rest.split(".")[0] if first == "fedjax_lora" else first


def violations(module: str, source: str) -> set[str]:
    """What `module` imports against the rule."""
    importer = package_of(module)

    def allowed(imported: str) -> bool:
        if not imported:
            return importer in VERSION_READERS
        below = LEVEL[imported] < LEVEL[importer]
        return below or imported == importer or (importer, imported) in SAME_LEVEL

    return {imported for imported in imported_packages(module, source) if not allowed(imported)}


def project_files() -> dict[str, Path]:
    """Module -> file; the root's `__init__` is left out: it may name anything that is public."""
    files = {}
    for root in (ROOT, ROOT / "kernels"):
        for name in ("fedjax_lora", "fedjax_lora_kernels"):
            for path in (root / name).rglob("*.py"):
                files[".".join(path.relative_to(root).with_suffix("").parts)] = path
    return {module: path for module, path in files.items() if module != "fedjax_lora.__init__"}


def test_every_file_imports_downward_only():
    found = {
        module: wrong
        for module, path in project_files().items()
        if (wrong := violations(module, path.read_text(encoding="utf-8")))
    }
    assert not found


def test_every_package_has_a_layer():
    packages = {package_of(module) for module in project_files()}
    assert {"core", "sparsifiers", "sim", "config", "app"} <= packages <= set(LEVEL)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("fedjax_lora.sparsifiers.soft", "from fedjax_lora.core.types import Factors\nimport jax", set()),
        ("fedjax_lora.sparsifiers.soft", "from fedjax_lora.ops import products", set()),
        ("fedjax_lora.ops.products", "from fedjax_lora_kernels import gram", set()),
        ("fedjax_lora.sparsifiers.soft", "from fedjax_lora.sparsifiers import ranks", set()),
        ("fedjax_lora.sparsifiers.soft", "from fedjax_lora.adapters import lora", {"adapters"}),
        ("fedjax_lora.sparsifiers.soft", "def f():\n  import fedjax_lora.sim.engine", {"sim"}),
        ("fedjax_lora.sparsifiers.soft", "from . import ranks\nfrom .payload import dense_bits", set()),
        ("fedjax_lora.sparsifiers.soft", "from .. import core, sim\nfrom ..models.load import x", {"sim", "models"}),
        ("fedjax_lora.core.types", "from fedjax_lora import config, core", {"config"}),
        ("fedjax_lora.config.experiment", "from fedjax_lora.config.assemble import build", set()),
        ("fedjax_lora.config.experiment", "from fedjax_lora.io import log", {"io"}),
        ("fedjax_lora.io.plan", "from fedjax_lora.core.errors import ConfigError\nimport fedjax_lora.app.cli", {"app"}),
        ("fedjax_lora.sim.engine", "from fedjax_lora import __version__", {""}),
        ("fedjax_lora.methods", "from fedjax_lora.core.methods import Method", set()),
        ("fedjax_lora.sparsifiers.soft", "from fedjax_lora.methods import Method", {"methods"}),
        ("fedjax_lora.config.catalogue", "from fedjax_lora.sparsifiers import soft", set()),
        ("fedjax_lora.config.catalogue", "from fedjax_lora.app import keys", {"app"}),
        ("fedjax_lora_kernels.gram", "from fedjax_lora.core.types import Adapters", {"core"}),
        ("fedjax_lora_kernels.gram", "import fedjax_lora", {""}),
    ],
)
def test_the_rule_itself_against_cases_by_hand(module, source, wrong):
    assert violations(module, source) == wrong
