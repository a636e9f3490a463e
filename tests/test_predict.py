"""Runs from start to end, whose exports and predictions are PyTorch's own."""

import io
import json

import jax
import numpy as np
import pytest
import transformers
from rich.console import Console

from fedjax_lora.app import cli
from fedjax_lora.app.export import export, export_run
from fedjax_lora.app.load_run import load_run
from fedjax_lora.app.predict import predict, predict_run
from fedjax_lora.app.runner import run
from fedjax_lora.config.catalogue import Catalogue
from fedjax_lora.config.experiment import load_config
from oracles import tiny_models
from oracles.toy_bert import save_toy_bert
from oracles.trained_run import trained_run

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT

TRAIN = [
    "so good\tyes",
    "good film\tyes",
    "so long\tyes",
    "long and dull\tno",
    "so bad\tno",
    "bad film\tno",
    "dull\tno",
]
TEST = ["good and long\tyes", "good\tyes", "so good film\tyes", "film\tyes", "bad\tno", "dull film\tno", "long bad\tno"]
TEXTS = [line.partition("\t")[0] for line in TEST]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT and a data set of two labels."""
    path = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    tiny_models.save(path / "bert", transformers.BertModel.from_pretrained(save_toy_bert(path / "bert")))
    for name, lines in (("train", TRAIN), ("test", TEST)):
        (path / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return path


def finished(folder, out, *overrides):
    """A run of two rounds, which is over."""
    config = load_config(
        None,
        [
            "rounds=2",
            f"model={{pretrained: {folder / 'bert'}, pooling: cls}}",
            f"data={{source: tsv, train: {folder / 'train.tsv'}, test: {folder / 'test.tsv'}, max_length: 8}}",
            "clients={count: 3, partition: {kind: iid}}",
            "local={steps: 2, batch_size: 2, optimizer: {learning_rate: 0.02}}",
            "lora={max_rank: 3, rank: 2, alpha: 6.0, targets: [query, up]}",
            "sparsifier=dense",
            "control={name: ideal}",
            *overrides,
        ],
    )
    run(config, out, resume=False, console=Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="module")
def ended(folder, tmp_path_factory):
    """The folder of such a run."""
    return finished(folder, tmp_path_factory.mktemp("ended") / "run")


def torch_probabilities(folder, out):
    """`[texts, labels]` of PyTorch, PEFT and the tokenizer of the base model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(out).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.softmax(logits, -1).numpy()


PATTERNS = "lora={rank_pattern: {0.attention.self.query: 3, '.*[.]1[.].*': 1}, alpha_pattern: {query: 8}}"


@pytest.mark.parametrize("settings", [("sparsifier=soft", "aggregation=flexlora"), ("aggregation=fedex",)])
def test_the_accuracy_of_layers_of_different_ranks_is_that_of_pytorch_and_peft(folder, tmp_path, settings):
    """Oracle: PyTorch with PEFT on the exported folder, which names the ranks that are not the largest."""
    out = finished(folder, tmp_path / "run", PATTERNS, *settings)
    check_against_pytorch(folder, out, tmp_path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if "aggregation=fedex" not in settings:  # which merges more than these
        names = [f"encoder.layer.{layer}.{name}" for layer, name in ((0, "intermediate.dense"), *LAST)]
        assert config["r"] == 3 and config["rank_pattern"] == dict(zip(names, (2, 1, 1), strict=True))
        alphas = {name: 6.0 for name in names if "query" not in name}
        assert config["lora_alpha"] == 8.0 and config["alpha_pattern"] == alphas


LAST = [(1, "attention.self.query"), (1, "intermediate.dense")]
AGGREGATIONS = [f"{{name: {name}}}" for name in Catalogue.of().names("aggregation")][1:]  # `ended` is of the first
AGGREGATIONS += ["{name: fedex, start: keep}", "{name: fedex, start: reinit}"]


def check_against_pytorch(folder, out, tmp_path):
    export_run(out, tmp_path / "out")
    theirs = torch_probabilities(folder, tmp_path / "out")
    labels = [["no", "yes"][row.argmax()] for row in theirs]
    right = [label == line.partition("\t")[2] for label, line in zip(labels, TEST, strict=True)]
    assert json.loads((out / "summary.json").read_text())["final_accuracy"] == pytest.approx(np.mean(right))
    predicted = predict_lines(out, tmp_path)
    assert predicted.labels == labels
    np.testing.assert_allclose(predicted.values, theirs.max(-1), atol=1e-4)
    assert np.ptp(predicted.values) > 1e-3


def test_the_accuracy_of_a_run_is_that_of_pytorch_and_peft(folder, ended, tmp_path):
    """Oracle: PyTorch with PEFT on the exported folder; the labels are in the file."""
    check_against_pytorch(folder, ended, tmp_path)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_accuracy_of_each_aggregation_is_that_of_pytorch_and_peft(folder, tmp_path, aggregation):
    """Oracle: the same, of runs whose base changes, whose factors are drawn anew, or whose clients keep parts."""
    check_against_pytorch(folder, finished(folder, tmp_path / "run", f"aggregation={aggregation}"), tmp_path)


def predict_lines(out, tmp_path, **options):
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return predict_run(out, str(tmp_path / "texts.txt"), **options)


def test_predictions_are_those_of_the_loaded_run(ended, tmp_path):
    """Oracle: `Simulation.predict` on the held-out examples, which are the texts."""
    loaded = load_run(ended)
    test = loaded.simulation.world.data.test
    inputs = {name: test[name] for name in ("input_ids", "attention_mask")}
    ours = jax.nn.softmax(loaded.simulation.predict(loaded.state, inputs))
    np.testing.assert_allclose(predict_lines(ended, tmp_path).values, ours.max(-1), atol=1e-5)


FILES = {
    "texts.tsv": "id\tsentence\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)),
    "texts.csv": "text,id\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(TEXTS)),
    "labelled.tsv": "".join(f"{line}\n" for line in TEST),
    "texts.jsonl": "".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", FILES)
def test_columns_are_read_as_lines_are(ended, tmp_path, name):
    """Oracle: the same texts, one a line."""
    (tmp_path / name).write_text(FILES[name])
    found, expected = predict_run(ended, str(tmp_path / name)), predict_lines(ended, tmp_path)
    assert (found.labels, found.values) == (expected.labels, expected.values)


def test_the_command_prints_a_line_for_each_text(ended, tmp_path, capsys, monkeypatch):
    """Oracle: the predictions themselves."""
    expected = predict_lines(ended, tmp_path)
    pairs = list(zip(expected.labels, expected.values, strict=True))
    assert cli.main(["predict", str(ended), str(tmp_path / "texts.txt")]) == 0
    assert capsys.readouterr().out == "".join(f"{label}\t{probability}\n" for label, probability in pairs)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert cli.main(["predict", str(ended), "--json", "--out", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    assert [(line["label"], line["probability"]) for line in lines] == pairs


def as_pytorch(folder, tmp_path, task, auto):
    """An open run of this task, the tokens of two texts, and what the merged export computes of them."""
    (tmp_path / "base").symlink_to(folder / "bert")
    opened, _ = trained_run(tmp_path, task, "cls", ("first", "second", "third"))
    export(opened, tmp_path / "out", "merged")
    (tmp_path / "texts.txt").write_text("so good film\ndull\n")
    words = [["so", "good", "film"], ["dull"]]
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(
        words, is_split_into_words=True, padding=True, return_tensors="pt"
    )
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return opened, tokens, auto.from_pretrained(tmp_path / "out").eval()(**inputs).logits


def test_each_word_has_a_label(folder, tmp_path):
    """Oracle: PyTorch's probabilities at the first token of each word."""
    auto = transformers.AutoModelForTokenClassification
    opened, tokens, logits = as_pytorch(folder, tmp_path, "token_classification", auto)
    found = predict(opened, str(tmp_path / "texts.txt"))
    for row, count in ((0, 3), (1, 1)):
        places = [tokens.word_ids(row).index(word) for word in range(count)]
        theirs = torch.softmax(logits[row, places], -1)
        assert found.labels[row] == [opened.labels[i] for i in theirs.argmax(-1)]
        np.testing.assert_allclose(found.values[row], theirs.max(-1).values, atol=1e-5)
    assert next(found.lines()).count(" ") == 4


def test_a_number_is_predicted_as_it_is(folder, tmp_path):
    """Oracle: PyTorch's one output."""
    auto = transformers.AutoModelForSequenceClassification
    opened, _, logits = as_pytorch(folder, tmp_path, "regression", auto)
    found = predict(opened, str(tmp_path / "texts.txt"))
    np.testing.assert_allclose(found.values, logits[:, 0], atol=1e-5)
    assert [set(json.loads(line)) for line in found.lines(as_json=True)] == 2 * [{"text", "value"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("texts.txt", None, ["FILE", "can be read", "texts.txt"]),
        ("texts.txt", "\n \n", ["FILE must hold at least one text, got none"]),
        ("texts.csv", "name,id\ngood,1\n", ["texts.csv", "a column of text", "got name, id"]),
        ("texts.tsv", "text\tid\ngood\n", ["texts.tsv, line 2: must have 2 fields, as line 1 has, got 1"]),
        ("texts.tsv", "text\n", ["a header and at least one row, got 1 lines"]),
        ("texts.jsonl", '{"text": 3}\n', ["texts.jsonl, line 1", "must be text, got 3"]),
    ],
)
def test_what_cannot_be_read_is_one_line(ended, tmp_path, capsys, name, content, expected):
    """The message names the file, and what it got."""
    if content is not None:
        (tmp_path / name).write_text(content)
    assert cli.main(["predict", str(ended), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in expected), error


def test_a_file_that_is_there_is_not_written_over(ended, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert cli.main(["predict", str(ended), "--out", str(tmp_path / "out")]) == 2
    assert "--out must be a new file" in capsys.readouterr().err
