"""From a configuration to a simulation: where a model, its tokenizer and the data meet."""

import json

import pytest
import transformers

from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import ConfigError, load_config
from oracles.toy_bert import SPECIAL, WORDS, save_toy_bert

TRAIN = "good film\tyes\nbad\tno\nso long and dull\tno\ngood\tyes\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.tsv").write_text(TRAIN)
    (tmp_path / "test.tsv").write_text("bad film\tno\n")
    save_toy_bert(tmp_path / "model")
    return tmp_path


def built(folder, *overrides):
    settings = [
        f"data={{source: tsv, train: {folder}/train.tsv, test: {folder}/test.tsv, max_length: 12}}",
        f"model.pretrained={folder}/model",
        "clients.count=2",
        "local.batch_size=2",
        "lora={max_rank: 2, rank: 2}",
    ]
    return build(load_config(None, [*settings, *overrides]))


def test_a_simulation_tells_what_it_was_made_of(folder):
    """Counting: of the three hashes each changes with its own file alone; classes by their text."""

    def hashes():
        simulation = built(folder, "engine.client_chunk=1")
        assert simulation.facts.class_names == ("no", "yes")
        return simulation.facts.model_config_hash, simulation.facts.tokenizer_hash, simulation.facts.base_hash

    before = hashes()
    assert all(len(value) == 64 for value in before)
    for name, place, change in (
        ("config.json", 0, {"hidden_act": "relu"}),
        ("tokenizer_config.json", 1, {"truncation_side": "left"}),
    ):
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        after = hashes()
        assert [i for i in range(3) if after[i] != before[i]] == [place]
        before = after


@pytest.mark.parametrize("file", ["train.tsv", "test.tsv"])
def test_a_token_without_a_row_is_one_line_before_weights_are_read(folder, file):
    """The largest id by hand: the first after the words of the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["splendid"])
    tokenizer.save_pretrained(folder / "model")
    built(folder, "engine.client_chunk=1")  # no sentence has the token
    (folder / "model" / "model.safetensors").unlink()
    with (folder / file).open("a") as lines:
        lines.write("splendid film\tyes\n")
    rows = len(SPECIAL + WORDS)
    message = f"model.pretrained must have a row .*, got the largest token id {rows} where vocab_size .* is {rows}$"
    with pytest.raises(ConfigError, match=message):
        built(folder)


def test_sentences_longer_than_the_positions_are_one_line_before_any_file_is_read(folder):
    (folder / "train.tsv").unlink()
    with pytest.raises(ConfigError, match=r"^data\.max_length must be at most 64, the model's positions, got 65$"):
        built(folder, "data.max_length=65")
