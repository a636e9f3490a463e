"""The examples of the README run as they are printed, on small stand-ins for what they download.

Oracle: each command ends with status 0, and what it should write is there.
"""

import csv
import io
import json
import re
import shlex
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import transformers
from datasets import ClassLabel, Dataset, Features, Image

from fedjax_lora.app.cli import main
from oracles.toy_bert import WORDS, save_toy_bert, save_toy_llama

README = Path(__file__).parents[1] / "README.md"
SMALL = ["rounds=2", "clients.count=3", "local.steps=1", "local.batch_size=2", "engine.eval_every=2"]
SENTENCES = [f"{WORDS[i % 2]} film so long" for i in range(12)]


def examples():
    """Comment above -> its commands."""
    block = re.search(r"## Your model.*?```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert block is not None
    found = {}
    for part in block[1].strip().split("\n\n"):
        comment, *commands = part.splitlines()
        found[comment.removeprefix("# ")] = commands
    return found


EXAMPLES = examples()


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Models and data sets by their ids, and files by their names in the working directory."""
    pytest.importorskip("torch")
    vit = transformers.ViTConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3, patch_size=112
    )
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    models = {
        "sentence-transformers/all-MiniLM-L6-v2": save_toy_bert(tmp_path / "bert"),
        "HuggingFaceTB/SmolLM2-135M": save_toy_llama(tmp_path / "llama"),
        "google/vit-base-patch16-224-in21k": tmp_path / "vit",
    }
    transformers.AutoTokenizer.from_pretrained(tmp_path / "llama", eos_token="[SEP]").save_pretrained(
        tmp_path / "llama"
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(models[name]))

    import PIL.Image

    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog"])})
    images = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue") * 4]
    cifar = Dataset.from_dict({"img": images, "label": [0, 1] * 4}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, *, split: cifar)

    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([text, text[:4]] for text in SENTENCES)])
    pairs = "".join(json.dumps({"prompt": text, "response": "so dull"}) + "\n" for text in SENTENCES)
    for name in ("pairs", "held_out"):
        Path(f"{name}.jsonl").write_text(pairs)


def run(command, monkeypatch):
    piped, _, command = command.rpartition(" | ")
    if piped:
        monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(piped)[1] + "\n"))
    program, *arguments = shlex.split(command)
    assert program == "fedjax-lora"
    if "--set" in arguments:
        place = arguments.index("--out")  # after all that is printed
        arguments = [*arguments[:place], *SMALL, *arguments[place:]]
    assert main(arguments) == 0
    return arguments


@pytest.mark.filterwarnings("ignore::fedjax_lora.core.errors.ConfigWarning")
@pytest.mark.parametrize("comment", EXAMPLES, ids=["table", "pairs", "images"])
def test_an_example_runs_as_it_is_printed(comment, stand_ins, monkeypatch, capsys):
    written = [run(command, monkeypatch) for command in EXAMPLES[comment]]
    out = capsys.readouterr().out.splitlines()
    for arguments in written:
        if "--out" in arguments:
            assert json.loads((Path(arguments[-1]) / "summary.json").read_text())["rounds"] == 2
        if arguments[0] == "export":
            assert list(Path(arguments[2]).glob("*model*.safetensors"))
        if arguments[0] == "predict":
            label, probability = next(line for line in out if "\t" in line).split("\t")
            assert label in ("good", "bad") and 0 <= float(probability) <= 1
