"""Data sets of Hugging Face, from folders and in the place of the hub: known names on miniatures with their columns."""

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from fedjax_lora.core.methods import Context
from fedjax_lora.data import known, sources
from fedjax_lora.data.options import HubConfig
from fedjax_lora.data.sources import load
from fedjax_lora.testing import examples

TEXT, NUMBER = Value("string"), Value("float32")
GLUE = {
    "cola": ("sentence", ("unacceptable", "acceptable")),
    "sst2": ("sentence", ("negative", "positive")),
    "mrpc": ("sentence1 sentence2", ("not_equivalent", "equivalent")),
    "qqp": ("question1 question2", ("not_duplicate", "duplicate")),
    "stsb": ("sentence1 sentence2", None),
    "mnli": ("premise hypothesis", ("entailment", "neutral", "contradiction")),
    "qnli": ("question sentence", ("entailment", "not_entailment")),
    "rte": ("sentence1 sentence2", ("entailment", "not_entailment")),
    "wnli": ("sentence1 sentence2", ("not_entailment", "entailment")),
}
"""Subset -> columns of text and the words of its label, as its card on the hub has them."""

OTHERS = {
    "ag_news": ("text", ("World", "Sports", "Business", "Sci/Tech")),
    "banking77": ("text", ("activate_my_card", "age_limit")),
}
DOLLY = {"instruction": TEXT, "context": TEXT, "response": TEXT, "category": TEXT}
ALPACA = {"instruction": TEXT, "input": TEXT, "output": TEXT, "text": TEXT}


def text(column, row):
    return f"{column} {('good', 'bad', 'the')[row % 3]}"


def miniature(columns, classes, rows=6):
    """A split with these columns of text, a label and an index."""
    label = NUMBER if classes is None else ClassLabel(names=list(classes))
    values = {column: [text(column, row) for row in range(rows)] for column in columns}
    values["label"] = [row / 2 if classes is None else row % len(classes) for row in range(rows)]
    features = Features(dict.fromkeys(columns, TEXT) | {"label": label, "idx": Value("int32")})
    return Dataset.from_dict({**values, "idx": list(range(rows))}, features=features)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts splits in the place of the hub's, which `load_dataset` then finds under their id and subset."""
    held = {}

    def put(path, subset, splits):
        folder = str(tmp_path / f"{path}-{subset}".replace("/", "-"))
        DatasetDict(splits).save_to_disk(folder)
        held[path, subset] = folder

    def load_dataset(path, name=None, *, split):
        if (path, name) not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        found = datasets.load_from_disk(held[path, name])
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(found[name]) for name in found})
        return found[parts[0].splitname].select(range(parts[0].from_, parts[0].to))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return put


def read(dataset, learns="label", **options):
    """The examples, and the words that their ids stand for: a tokenizer of whole words."""
    config, tokenizer = HubConfig(dataset=dataset, **options), examples.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    return load(config, None if config.image else tokenizer, learns=learns)


@pytest.mark.parametrize("name", [*GLUE, *OTHERS])
def test_known_texts_have_their_columns_classes_and_splits(hub, name):
    """The oracle is the card of each: as many sequences as columns of text, in their order, and its classes' names."""
    columns, classes = {**GLUE, **OTHERS}[name]
    entry, splits = known.KNOWN[name], {}
    columns = columns.split()
    splits[entry.train] = miniature(columns, classes)
    splits[entry.test] = miniature(columns, classes, rows=4)
    splits["test" if name in GLUE else "validation"] = miniature(columns, classes, rows=1)
    hub(entry.path, name if name in GLUE else None, splits)
    found = read(name, entry.learns)
    assert (len(found.train["label"]), len(found.test["label"])) == (6, 4)
    words = examples.tokenizer()
    expected = words(*[[text(column, row) for row in range(6)] for column in columns])["input_ids"]
    for ids, mask, whole in zip(found.train["input_ids"], found.train["attention_mask"], expected, strict=True):
        assert ids[mask == 1].tolist() == whole
    if classes is None:
        np.testing.assert_array_equal(found.train["target"], np.arange(6) / 2)
    else:
        assert found.class_names == classes
        np.testing.assert_array_equal(found.train["label"], np.arange(6) % len(classes))
    scored = f"{name} is scored by {', '.join(entry.metrics)} where it was published"
    assert found.notes == (scored,)  # no column was guessed
    if name == "stsb":
        assert read(name).notes == (f"{scored}; it was made for a task that learns number",)
    if name in GLUE:
        assert read(entry.path, entry.learns, subset=name).fingerprint == found.fingerprint


def test_the_test_split_of_glue_is_the_one_with_labels_table():
    splits = {name: known.KNOWN[name].test for name in GLUE}
    assert splits == {name: "validation_matched" if name == "mnli" else "validation" for name in GLUE}
    assert {name: known.KNOWN[name].metrics for name in ("cola", "qqp", "stsb", "sst2")} == {
        "cola": ("matthews_correlation",),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "sst2": ("accuracy",),
    }


def test_newsgroups_are_named_by_their_texts(hub):
    """By hand: the integers of the column `label` are not what the classes are called."""
    rows = {"text": ["a", "the", "a"], "label": [1, 0, 1], "label_text": ["sci.med", "alt.atheism", "sci.med"]}
    hub("SetFit/20_newsgroups", None, {"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)})
    for name in ("20newsgroups", "SetFit/20_newsgroups"):
        found = read(name)
        assert found.class_names == ("alt.atheism", "sci.med")
        np.testing.assert_array_equal(found.train["label"], [1, 0, 1])


@pytest.mark.parametrize(("name", "features", "context"), [("dolly", DOLLY, "context"), ("alpaca", ALPACA, "input")])
def test_known_instructions_are_split_and_written_with_their_context(hub, name, features, context):
    """By hand: the last twentieth tests, and each word of the template is there."""
    rows = 40
    values = {column: [f"{column} {row}" for row in range(rows)] for column in features}
    values[context][0] = ""
    if "category" in features:
        values["category"] = ["brainstorming", "open_qa"] * (rows // 2)
    hub(known.KNOWN[name].path, None, {"train": Dataset.from_dict(values, features=Features(features))})
    found = read(name, "next_token", max_length=40)
    assert (len(found.train["label"]), len(found.test["label"])) == (38, 2)
    heads = [["Instruction"], ["Instruction", "Input"]]
    for row, wanted in enumerate(heads):
        target, mask = found.train["target"][row], found.train["attention_mask"][row]
        # "### : <word> <number>" of each heading, "### Response :", and a response of two words and its end
        assert mask.sum() == len(wanted) * 5 + 3 + 2 + 1
        assert (target != -100).sum() == 3
    assert found.class_names == (("brainstorming", "open_qa") if "category" in features else ("all",))


def test_a_text_that_is_named_takes_the_place_of_what_is_known():
    """By hand: Alpaca has its prompt and response as one text too."""
    config = HubConfig(dataset="alpaca", columns=known.HubColumns(text="text"))
    assert config.chosen().columns.given() == {"text": "text"}


def pictures(rows, size=(32, 32)):
    """Images of one colour each, which a file of PNG keeps as they are."""
    from PIL import Image

    return [Image.new("RGB", size, (row * 10, 20, 255)) for row in range(rows)]


@pytest.mark.parametrize(("name", "label"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_known_images_are_read_by_their_columns(hub, name, label):
    """Closed form: the colour of each image over 255."""
    classes = ClassLabel(names=["airplane", "automobile", "bird"])
    features = Features({"img": datasets.Image(), label: classes, "coarse_label": Value("int64")})
    values = {"img": pictures(4), label: [2, 0, 1, 2], "coarse_label": [0] * 4}
    split = Dataset.from_dict(values, features=features)
    hub(known.KNOWN[name].path, None, {"train": split, "test": split.select(range(2))})
    found = read(name)
    assert found.image_shape == (32, 32, 3) and found.class_names == ("airplane", "automobile", "bird")
    np.testing.assert_array_equal(found.train["label"], [2, 0, 1, 2])
    expected = np.float32([[row * 10, 20, 255] for row in range(4)]) / np.float32(255)
    np.testing.assert_array_equal(found.train["image"], np.broadcast_to(expected[:, None, None], (4, 32, 32, 3)))
    assert read(name, image_size=16, channels=1).image_shape == (16, 16, 1)
    with pytest.raises(ValueError, match=r"^data\.source must be one of text for a task that learns number, got 'da"):
        read(name, "number")


def test_a_source_of_images_needs_a_model_of_images_and_one_of_text_a_tokenizer():
    method = next(method for method in sources.METHODS if method.name == "datasets")
    for config, need in ((HubConfig(dataset="cifar10"), "image_model"), (HubConfig(dataset="mine/own"), "text_model")):
        assert config.needs() == {need: "dataset"}
        assert method.make(config, Context(0, 0)).tokenizes == (need == "text_model")


def test_a_folder_is_read_with_columns_that_are_named_or_found(tmp_path):
    """Invariance: by the common names, and by other names that are given, the same examples."""
    split = miniature(["sentence"], ("no", "yes"))
    folder, other = str(tmp_path / "folder"), str(tmp_path / "other")
    DatasetDict({"train": split, "dev": split.select([3, 1])}).save_to_disk(folder)
    renamed = split.rename_columns({"sentence": "body", "label": "verdict"})
    DatasetDict({"train": renamed, "test": renamed.select([3, 1])}).save_to_disk(other)
    found = read(folder, test_split="dev")
    columns = known.HubColumns(text="body", label="verdict")
    assert read(other, columns=columns).fingerprint == found.fingerprint
    assert found.notes[0] == "columns by their names: text is 'sentence', label is 'label'"
    np.testing.assert_array_equal(found.test["label"], [1, 1])
    split.save_to_disk(str(tmp_path / "single"))
    halves = read(str(tmp_path / "single"), train_split="train[:50%]", test_split="train[50%:]")
    assert (len(halves.train["label"]), len(halves.test["label"])) == (3, 3)


def test_words_with_labels_that_are_numbers_bear_their_names(tmp_path):
    features = Features({"tokens": List(TEXT), "ner_tags": List(ClassLabel(names=["O", "B-PER", "I-PER"]))})
    split = Dataset.from_dict({"tokens": [["a", "good"], ["bad"]], "ner_tags": [[0, 2], [0]]}, features=features)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "folder"))
    found = read(str(tmp_path / "folder"), "token_label", max_length=4)
    assert found.class_names == ("O", "B-PER", "I-PER")
    np.testing.assert_array_equal(found.train["target"], [[0, 2, -100, -100], [0, -100, -100, -100]])
    np.testing.assert_array_equal(found.train["label"], [2, 0])


def test_labels_that_are_withheld_are_refused(tmp_path):
    split = miniature(["sentence"], ("no", "yes"))
    hidden = split.map(lambda row: {"label": -1})
    DatasetDict({"train": split, "test": hidden}).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"^data\.test_split .*folder test, row 1: label must be from 0 to 1, got -1$"):
        read(str(tmp_path / "folder"))


def test_what_is_not_there_is_one_line(tmp_path, hub):
    split = miniature(["sentence"], ("no", "yes"))
    folder = str(tmp_path / "folder")
    DatasetDict({"train": split, "dev": split}).save_to_disk(folder)
    (tmp_path / "empty").mkdir()
    nowhere = r"^data\.dataset must be reachable, got nobody/nothing: .*; without a network it must be a folder of save"
    for dataset, options, message in (
        (folder, {}, r"^data\.test_split must be one of train, dev, or a part of one as train\[:90%\], got test: "),
        (folder, {"train_split": "train[:0]"}, r"^data\.train_split .*: must hold at least one row, got none$"),
        (str(tmp_path / "empty"), {}, r"^data\.dataset must be a folder of save_to_disk, got .*empty: "),
        ("nobody/nothing", {}, nowhere),
        ("mnli", {"subset": "x"}, r"^data\.dataset must be reachable, got nyu-mll/glue with subset x: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(dataset, **options)
        assert "\n" not in str(caught.value)


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    """The library's own answer, which is told that it is offline."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^data\.dataset must be reachable, got nyu-mll/glue .*HF_HUB_OFFLINE=1$"
    ) as e:
        read("sst2")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dataset": None},
            r"^dataset must be one of cola, .*, an id of the Hugging Face hub, or a folder .*, got None$",
        ),
        ({"test_split": ""}, r"^test_split must be the name of a split, got ''$"),
        ({"channels": 2}, r"^channels must be 1 or 3, got 2$"),
        ({"image_size": 0}, r"^image_size must be at least 1, got 0$"),
    ],
)
def test_config_errors_name_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        HubConfig(**{"dataset": "sst2", **fields})
