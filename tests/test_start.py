"""What a start costs: what is imported for a word of help, and what is kept on disk between two runs."""

import json
import os
import subprocess
import sys
import warnings

import jax
import pytest

from fedjax_lora.app import cli
from fedjax_lora.data import cache


def printed(script: str, *arguments: str) -> str:
    """What a fresh Python prints that runs a script; its stderr must stay empty."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("commands", "allowed"),
    [
        ([["--version"], ["--help"], *([name, "--help"] for name in cli._COMMANDS)], set()),
        ([["presets"], ["cache"]], set()),
    ],
)
def test_help_and_lists_import_nothing_heavy(commands, allowed):
    """Oracle: the modules of a process that has answered them all."""
    script = """
import contextlib, io, json, sys
from fedjax_lora.app import cli
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(command)
print(*{name.split(".")[0] for name in sys.modules})
"""
    imported = set(printed(script, json.dumps(commands)).split())
    assert {"argparse", "fedjax_lora"} <= imported
    heavy = {"jax", "jaxlib", "numpy", "flax", "optax", "yaml", "rich", "cattrs", "matplotlib", "transformers"}
    assert imported & heavy == allowed


def test_the_package_has_its_names_whatever_was_imported_before():
    """Oracle: the names themselves, where a module of theirs is imported first."""
    script = """
import fedjax_lora as fl
import sys
assert "jax" not in sys.modules
import fedjax_lora.config.assemble
from fedjax_lora.config.assemble import build
from fedjax_lora import build as public
from fedjax_lora import load_config, wireless
assert fl.build is build is public
assert set(fl.__all__) <= set(dir(fl))
for name in fl.__all__:
    getattr(fl, name)
assert fl.wireless is wireless and fl.control.__name__ == "fedjax_lora.control"
try:
    fl.nonsense
except AttributeError as error:
    print(error)
"""
    assert printed(script) == "module 'fedjax_lora' has no attribute 'nonsense'\n"


def test_no_one_is_told_that_pytorch_is_missing(tmp_path):
    """A process that does not find it, as where it is not installed: `printed` asserts that nothing is said."""
    script = """
import contextlib, importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
from fedjax_lora.models.load import load_tokenizer
with contextlib.suppress(ValueError):
    load_tokenizer(sys.argv[1])  # there is none
import transformers
print(transformers.utils.is_torch_available())
"""
    assert printed(script, str(tmp_path)) == "False\n"


@pytest.fixture
def jax_without_cache(monkeypatch):
    """JAX as it is where nobody has told it of a folder; nothing may be compiled meanwhile."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, 1.0), strict=True):  # JAX's own defaults
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("command", ["run", "plan", "sweep"])
def test_commands_that_compile_keep_their_programs(command, jax_without_cache, monkeypatch, tmp_path):
    """The command ends before it compiles, by a mistake."""
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path))
    over = ["--over", "seed=[0]"] if command == "sweep" else []
    assert cli.main([command, "--set", "rounds=many", *over]) == 2
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1.0


def test_a_folder_that_the_user_chose_for_programs_stands(jax_without_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")  # as JAX_COMPILATION_CACHE_DIR does
    cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere" and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_one_warning(jax_without_cache, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "file" / "cache"))
    with cli._warnings_in_one_line():
        warnings.simplefilter("default")
        cache.keep_programs()
    assert capsys.readouterr().err == (
        f"fedjax-lora: warning: compiled programs are not kept, {tmp_path / 'file' / 'cache' / 'programs'}: "
        "Not a directory\n"
    )
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_that_cannot_be_kept_cost_time_and_one_line(tmp_path):
    """In JAX's own words: two programs, each of which it can neither read nor write, of a damaged cache."""
    script = """
import sys
from fedjax_lora.app import cli
from fedjax_lora.data.cache import keep_programs
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
with cli._warnings_in_one_line():
    for size in (3, 5):
        print(jax.jit(lambda x: x + 1)(jax.numpy.zeros(size)).sum())
"""
    folder = tmp_path / "programs"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert run().stderr == ""
    for path in folder.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:9])
    damaged = run()
    assert damaged.stdout == "3.0\n5.0\n"
    assert damaged.stderr.count("\n") == 1
    assert damaged.stderr.startswith("fedjax-lora: warning: Error reading persistent compilation cache")


def test_the_cache_is_shown_and_cleared_without_the_files_of_others(monkeypatch, tmp_path, capsys):
    """Files by hand, named as those of JAX, of the tokens and of pre-training."""
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path))
    ours = {
        f"programs/jit_segment-{'0a' * 32}-cache": 1_500_000,
        f"programs/jit__normal-{'1b' * 32}-cache": 100_000,
        f"tokens-{'2c' * 32}.safetensors": 300_000,
        f"tokens-{'2c' * 32}.safetensorsx1y2.part": 0,
        f"pool-{'4e' * 32}.npy": 400_000,
        f"pretrained-{'3d' * 8}.safetensors": 800_000,
        f".pretrained-{'3d' * 8}.safetensors.partial-17": 0,
    }
    others = [
        "notes.txt",
        "tokens-mine.safetensors",
        "pool-mine.npy",
        "programs/notes.txt",
        "elsewhere/programs/x-cache",
    ]
    for name, size in {**ours, **dict.fromkeys(others, 5)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)

    assert cli.main(["cache"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2 files, 1.6 MB" in lines["programs"] and str(tmp_path / "programs") in lines["programs"]
    assert "2 files, 0.3 MB" in lines["tokens"] and "2 files, 0.8 MB" in lines["pretrained models"]
    assert "1 files, 0.4 MB" in lines["training pools"]
    assert cli.main(["cache", "--clear"]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert "cleared" in capsys.readouterr().out
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "none"))
    assert cli.main(["cache"]) == 0 and not (tmp_path / "none").exists()
    assert "programs              0 files, 0.0 MB" in capsys.readouterr().out
