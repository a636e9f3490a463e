"""From a configuration to a simulation: where a model, its tokenizer and the data meet."""

import json

import pytest
import transformers
from PIL import Image

from fedjax_lora.config.assemble import build, read_examples
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import ConfigError, dump, load_config
from fedjax_lora.config.groups import grouped
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


TABLE = "client,review,stars\n" + "".join(f"user {i % 3},good film,{i % 2}\n" for i in range(7))


def table(folder, *overrides):
    """The configuration of a CSV file whose columns are named, and whose rows say who holds them."""
    for part in ("train.csv", "test.csv"):
        (folder / part).write_text(TABLE)
    settings = [
        f"data={{source: csv, train: {folder}/train.csv, test: {folder}/test.csv, columns: {{label: stars}}}}",
        f"model.pretrained={folder}/model",
        "clients={count: 3, partition: {kind: natural}}",
        "local.batch_size=2",
        "lora={max_rank: 2, rank: 2}",
    ]
    return load_config(None, [*settings, *overrides])


def test_a_table_of_ones_own_is_built_and_dealt_as_it_says_loop(folder):
    config = table(folder)
    simulation = build(config)
    data = simulation.world.data
    held = [sorted(row[:count].tolist()) for row, count in zip(data.index, data.count, strict=True)]
    assert held == [[0, 3, 6], [1, 4], [2, 5]]
    assert data.train["label"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert simulation.facts.notes == ("columns by their names: client is 'client', text is 'review'",)
    loaded = folder / "again.yaml"
    loaded.write_text(dump(config))
    assert load_config(loaded) == config


def test_natural_clients_are_the_same_in_a_group_invariance(folder):
    """Trials of one program that deal by the data and by chance: each has the partition of its own single run."""
    configs = [table(folder, *more) for more in ([], ["clients.partition.kind=iid"], ["clients.count=2"])]
    groups, refused = grouped(configs[:2])
    assert not refused and len(groups) == 1
    assert [facts.partition_hash for facts in groups[0].facts] == [
        build(one).facts.partition_hash for one in configs[:2]
    ]
    with pytest.raises(ConfigError, match=r"^clients\.count must be 3, the clients of the data, where .*, got 2$"):
        build(configs[2])


def test_a_folder_of_images_is_found(tmp_path, monkeypatch):
    """Counting; the paths are relative, and found from another directory."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / part / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    settings = ["data={source: images, train: train, test: test, image_size: 8}", "clients.count=2"]
    config = load_config(None, settings)
    monkeypatch.chdir(tmp_path.parent)
    examples = read_examples(config, Catalogue.of())
    assert examples.class_names == ("a", "b")
    assert examples.train["image"].shape == (4, 8, 8, 3)


def test_a_data_set_is_a_known_name_a_folder_or_an_id(tmp_path, monkeypatch):
    """By hand: a folder is found from any directory, unless it is called as a known data set."""
    for name in ("sst2", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for given, expected in (("sst2", "sst2"), ("mine", str(tmp_path / "mine")), ("./sst2", str(tmp_path / "sst2"))):
        config = load_config(None, ["data.source=datasets", f"data.dataset={given}", "model.pretrained=x"])
        assert config.data.dataset == expected
    config = load_config(None, ["data={source: datasets, dataset: some/texts}", "model.pretrained=x"])
    assert config.data.dataset == "some/texts"
