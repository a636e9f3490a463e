"""Predictions for files, lines and words: which columns are read, and to which word a label belongs."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.app import cli
from fedjax_lora.app.export import export, export_run
from fedjax_lora.app.predict import predict as predict_open
from fedjax_lora.app.predict import predict_run
from fedjax_lora.app.runner import stamp, started_with
from fedjax_lora.config.assemble import build
from fedjax_lora.config.experiment import dump, load_config
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.data import sources
from fedjax_lora.data.options import ImagesConfig
from fedjax_lora.io.log import RunFolder
from fedjax_lora.io.run_files import FIELDS, read_data
from fedjax_lora.sim.engine import predict
from oracles import tiny_models
from oracles.toy_bert import save_toy_bert, save_toy_llama
from oracles.trained_run import trained_run

torch = pytest.importorskip("torch")

TEXTS = ["good film", "so long and dull", "bad"]
PAIRS = [
    {"premise": "good film", "hypothesis": "so good", "score": 1.5, "sentence": "dull"},
    {"premise": "bad", "hypothesis": "long and dull", "score": -0.5, "sentence": "so"},
    {"premise": "so", "hypothesis": "film", "score": 3, "sentence": "bad"},
]
WORDS = [
    {"words": ["good", " ", "film", "so", "long", "and", "dull", "bad"], "tags": list("abababab")},
    {"words": ["so", "bad"], "tags": ["a", "b"]},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_toy_bert(tmp_path_factory.mktemp("bert"))


def begun(bert, out, data, *overrides, methods=(), columns=True):
    """The folder of a run that has drawn its adapters and its head, and trained nothing; simulation and state."""
    given = [
        f"model={{pretrained: {bert}, pooling: mean}}",
        f"data={data}",
        "clients={count: 2, partition: {kind: iid}}",
        "local={steps: 1, batch_size: 2}",
        "lora={max_rank: 3, rank: 2, alpha: 6.0, targets: [query, up]}",
        *overrides,
    ]
    config = load_config(None, given, methods=methods)
    simulation = build(config, methods)
    state, key = simulation.program.start(jax.random.key(0), simulation.numbers), jax.random.key(5)
    adapters = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), state.adapters)
    state = state.replace(adapters=adapters, round=jnp.int32(1))
    more = stamp(simulation.facts) if columns else {}
    run = RunFolder.create(out, dump(config), started_with(simulation.facts) | more)
    line = dict.fromkeys(FIELDS, 0) | {"round": 1, "tail_energy": [0.0]}
    (run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    run.save(state)
    return run.path, simulation, state


def outputs(simulation, state, batch):
    """What the simulation computes of a batch."""
    return np.asarray(predict(simulation.make_parts, simulation.world, state, jax.tree.map(jnp.asarray, batch)))


@pytest.mark.parametrize("columns", [True, False])
def test_lines_serve_a_run_whose_columns_are_named(bert, tmp_path, columns, capsys, monkeypatch):
    """Oracle: the same texts in the named column, between the delimiter of the training data."""
    rows = "".join(f"{i};{text};{'ny'[i % 2]}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "train.csv").write_text(f"id;body;verdict\n{rows}")
    path = tmp_path / "train.csv"
    data = f"{{source: csv, train: {path}, test: {path}, delimiter: ;, columns: {{text: body, label: verdict}}}}"
    run, *_ = begun(bert, tmp_path / "run", data, columns=columns)
    assert read_data(run).get("columns") == ({"text": "body", "label": "verdict"} if columns else None)
    expected = predict_run(run, str(path))
    assert [*expected.inputs.columns["text"]] == TEXTS and np.ptp(expected.values) > 1e-3
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert cli.main(["predict", str(run)]) == 0
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected.lines())


def test_numbers_of_pairs_are_of_the_columns_of_training(bert, tmp_path):
    """Oracle: Hugging Face's tokens of both texts in the simulation; the pair was found by its names."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(PAIRS))
    data = f"{{source: jsonl, train: {path}, test: {path}, max_length: 10}}"
    run, *whole = begun(bert, tmp_path / "run", data, "task=regression")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    texts = ([row[name] for row in PAIRS] for name in ("premise", "hypothesis"))
    expected = outputs(*whole, dict(tokenizer(*texts, padding=True, return_tensors="np")))
    found = predict_run(run, str(path))
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.labels is None and np.ptp(expected) > 1e-3
    assert [json.loads(line)["value"] for line in found.lines(as_json=True)] == found.values
    path.write_text(lines([{"premise": "good", "sentence": "so"}]))
    with pytest.raises(ValueError, match=r"must have a column 'hypothesis', as the training data, got premise, sent"):
        predict_run(run, str(path))
    (tmp_path / "texts.txt").write_text("good\n")
    with pytest.raises(ValueError, match=r"^FILE must have the columns premise and hypothesis, .* got lines of text"):
        predict_run(run, str(tmp_path / "texts.txt"))


def test_each_word_has_the_label_of_its_own_token(bert, tmp_path, capsys):
    """Oracle: a loop over the words; a blank is no token, and the eighth word is beyond six words and two marks."""
    path = tmp_path / "words.jsonl"
    path.write_text(lines(WORDS))
    data = f"{{source: jsonl, train: {path}, test: {path}, max_length: 8}}"
    run, *whole = begun(bert, tmp_path / "run", data, "task=token_classification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    kept = [["good", "film", "so", "long", "and", "dull"], ["so", "bad"]]
    encoded = tokenizer([" ".join(words) for words in kept], padding=True, return_tensors="np")
    logits = outputs(*whole, {name: encoded[name] for name in ("input_ids", "attention_mask")})
    likely = np.exp(logits).max(-1) / np.exp(logits).sum(-1)
    expected = [["ab"[logits[i, 1 + t].argmax()] for t in range(len(words))] for i, words in enumerate(kept)]
    assert np.ptp(likely[0, 1:7]) > 1e-3
    found = predict_run(run, str(path))
    assert found.labels == [[expected[0][0], None, *expected[0][1:], None], expected[1]]
    np.testing.assert_allclose(found.values[1], likely[1, 1:3], atol=1e-5)
    np.testing.assert_allclose(found.values[0][2:7], likely[0, 2:7], atol=1e-5)
    assert cli.main(["predict", str(run), str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "note: 1 texts were cut to data.max_length = 8 tokens\n"
    assert printed.out.split("\t")[0] == " ".join(label or "-" for label in found.labels[0])
    (tmp_path / "words.txt").write_text("so bad\n")
    assert predict_run(run, str(tmp_path / "words.txt")).labels == [expected[1]]


def of_pytorch(model, ids, first):
    """Perplexity of the tokens from place `first` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:])).exp().item()


def test_the_perplexity_of_a_response_is_that_of_pytorch(tmp_path, capsys):
    """Oracle: transformers on the merged export, one text at a time; a prompt that fills all has no response left."""
    llama, path = save_toy_llama(tmp_path / "llama"), tmp_path / "pairs.jsonl"
    fields = json.loads((llama / "tokenizer_config.json").read_text()) | {"eos_token": "[SEP]"}
    (llama / "tokenizer_config.json").write_text(json.dumps(fields))
    rows = [{"prompt": "so good", "response": "film"}, {"prompt": "bad", "response": "long and dull"}]
    path.write_text(lines(rows))
    data = f"{{source: jsonl, train: {path}, test: {path}, template: plain, max_length: 7}}"
    run, *_ = begun(llama, tmp_path / "run", data, "task=causal_lm")
    export_run(run, tmp_path / "merged", form="merged")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    path.write_text(lines([*rows, {"prompt": "so " * 9, "response": "bad"}]))
    found = predict_run(run, str(path))
    for row, value in zip(rows, found.values[:2], strict=True):
        prompt, response = (tokenizer(row[role], add_special_tokens=False)["input_ids"] for role in row)
        assert value == pytest.approx(of_pytorch(model, [1, *prompt, *response, 2], 1 + len(prompt)), rel=1e-5)
    assert found.labels is None and found.values[2] is None and found.notes
    assert cli.main(["predict", str(run), str(path), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"prompt": "so " * 9, "response": "bad", "perplexity": None}
    (tmp_path / "texts.txt").write_text("good\n")
    with pytest.raises(ValueError, match=r"^FILE must have the columns prompt and response, which the run has learned"):
        predict_run(run, str(tmp_path / "texts.txt"))


def test_images_have_the_labels_that_pytorch_gives(tmp_path):
    """Oracle: transformers on the merged export; of a folder the files that are images, sorted, or of one alone."""
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(**{**tiny_models.CONFIGS["vit"].to_dict(), "image_size": 4})
    tiny_models.save(tmp_path / "base", transformers.ViTModel(config))
    opened, _ = trained_run(tmp_path, "classification", "cls", ("a", "b", "c"))
    data = ImagesConfig(train="a", test="b", image_size=4)
    opened = opened._replace(config=dataclasses.replace(opened.config, data=data))
    export(opened, tmp_path / "merged", "merged")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("none")
    for name, value in zip("xyz", pixels, strict=True):
        image.fromarray(value).save(tmp_path / "images" / f"{name}.png")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.tensor(pixels / 255, dtype=torch.float32).permute(0, 3, 1, 2)).logits
    likely = torch.softmax(logits, -1).max(-1)
    found = predict_open(opened, str(tmp_path / "images"))
    assert found.labels == ["abc"[i] for i in likely.indices]
    np.testing.assert_allclose(found.values, likely.values, atol=1e-5)
    path = str(tmp_path / "images" / "y.png")
    one = predict_open(opened, path)
    assert one.values[0] == pytest.approx(found.values[1], abs=1e-5)
    assert [*one.lines()] == [f"{found.labels[1]}\t{one.values[0]}\t{path}"]
    for name, message in (("absent", "which is neither"), ("merged", "must be a folder that holds images")):
        with pytest.raises(ValueError, match=message):
            predict_open(opened, str(tmp_path / name))


def test_a_run_on_arrays_is_exported_and_reads_no_texts(bert, tmp_path):
    """One line for texts, since no tokenizer made the ids, and for an id that the model has no row for."""

    def arrays(largest):
        pool = {"input_ids": [[1, largest], [1, 4]], "attention_mask": [[1, 1]] * 2, "label": [0, 1]}
        return sources.arrays("mine", train=pool, test=pool, class_names=("no", "yes"))

    methods = [arrays(10)]
    run, *_ = begun(bert, tmp_path / "run", "mine", methods=methods)
    export_run(run, tmp_path / "out", methods)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    (tmp_path / "texts.txt").write_text("good\n")
    with pytest.raises(ValueError, match=r"^data.source must be one that reads texts to predict, got 'mine' in "):
        predict_run(run, str(tmp_path / "texts.txt"), methods)
    with pytest.raises(ConfigError, match=r"got the largest token id 11 where vocab_size in config.json is 11$"):
        begun(bert, tmp_path / "other", "mine", methods=[arrays(11)])
