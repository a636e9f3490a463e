"""Loading of Hugging Face folders: names, shards, prefixes, and one clear line for each thing that is wrong."""

import dataclasses
import json
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora
from fedjax_lora.core.learning import Features, Hidden, Model, Site
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import Options
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import families, load, safetensors, table
from oracles.model_context import model_context

torch = pytest.importorskip("torch")
torch_file = pytest.importorskip("safetensors.torch")

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}


@pytest.fixture
def folder(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def build(folder, **options):
    return load.build_model(load.ModelConfig(pretrained=str(folder), **options), model_context(2))


DOUBLED = 2e-4
"""Tolerance where all weights are doubled: attention is sharper, and what is rounded before it counts for more."""


def assert_matches_pytorch(folder, tolerance=2e-5):
    model, base = build(folder)
    ids = np.arange(30).reshape(3, 10) % 31
    mask = (np.arange(10) < np.array([10, 4, 7])[:, None]).astype(np.int64)
    with torch.no_grad():
        reference = transformers.BertModel.from_pretrained(folder).eval()
        expected = reference(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}
    no_adapters = Adapters(modules={}, head={})
    hidden = jax.jit(lambda base: model.layers(base, no_adapters, model.embed(base, batch, None), None))(base)
    np.testing.assert_allclose(hidden.values, expected, atol=tolerance, rtol=0)


def test_random_bert_against_pytorch(folder):
    assert_matches_pytorch(folder)


def test_sharded_folder_against_pytorch(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SHAPE))
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    assert_matches_pytorch(tmp_path)


def test_prefixed_names_of_a_classifier_against_pytorch(tmp_path):
    transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    assert any(name.startswith("bert.") for name in load_file(tmp_path / "model.safetensors"))
    assert_matches_pytorch(tmp_path)


def test_names_of_a_converted_checkpoint_against_pytorch(folder):
    """As bert-base-uncased has them; transformers renames them too."""
    pairs = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors):
        for name in list(tensors):
            for new, old in pairs.items():
                if name.endswith(new):
                    tensors[name.removesuffix(new) + old] = tensors.pop(name) + np.float32(0.1)

    rewrite(folder, rename)
    assert_matches_pytorch(folder)


def test_pooler_serves_cls_pooling_where_the_folder_has_one(folder):
    model, base = build(folder, pooling="cls")
    ids = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = transformers.BertModel.from_pretrained(folder).eval()(torch.tensor(ids)).pooler_output.numpy()
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones((2, 10))}
    head = {"w": jnp.eye(24)[:, :5], "b": jnp.zeros(5)}
    got = jax.jit(model.apply)(base, Adapters(modules={}, head=head), batch)
    np.testing.assert_allclose(got, expected[:, :5], atol=2e-5)
    assert "pooler" not in build(folder)[1]


def test_bfloat16_is_kept_for_the_matrices_alone(folder):
    _, base = build(folder, compute_dtype="bfloat16")
    _, full = build(folder)
    low = {name: leaf.dtype for name, leaf in base["layers"]["up"].items()}
    assert low == {"w": jnp.bfloat16, "b": jnp.float32}
    assert base["embeddings"]["word"].dtype == jnp.float32
    np.testing.assert_array_equal(base["layers"]["up"]["w"], full["layers"]["up"]["w"].astype(jnp.bfloat16))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("encoder.layer.1.attention.self.key.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: encoder.layer.1.attention.self.key.weight$"):
        build(folder)


HEADS = (
    "cls.predictions.bias",
    "qa_outputs.weight",
    "classifier.weight",
    "lm_head.weight",
    "score.weight",
    "own.head.w",
)


@pytest.mark.parametrize("head", ["BertForQuestionAnswering", "BertForPreTraining", "BertForTokenClassification"])
def test_heads_of_any_task_are_ignored_against_pytorch(tmp_path, head):
    getattr(transformers, head)(transformers.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    assert_matches_pytorch(tmp_path)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_unexpected_tensor_of_the_encoder_is_named_and_those_of_heads_are_not(folder, prefix):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)
        tensors.update({name: np.zeros(3, np.float32) for name in HEADS})

    rewrite(folder, change)
    build(folder)
    unknown = f"{prefix}encoder.layer.2.output.dense.bias"
    rewrite(folder, lambda tensors: tensors.update({unknown: np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=rf"has unexpected 1 tensors: {unknown}$"):
        build(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"])
def test_weights_that_are_not_finite_are_named(folder, name, value):
    rewrite(folder, lambda tensors: tensors[name].flat.__setitem__(-1, value))
    with pytest.raises(
        ValueError, match=rf"must hold finite weights, got NaN or infinity in {name} of .*model.safetensors$"
    ):
        build(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_read_oracle_their_rounding(folder, dtype):
    name = "encoder.layer.1.output.dense.bias"
    rounded = torch.tensor(load_file(folder / "model.safetensors")[name]).to(getattr(torch, dtype))
    tensors = torch_file.load_file(folder / "model.safetensors")
    torch_file.save_file({**tensors, name: rounded}, folder / "model.safetensors")
    _, base = build(folder)
    np.testing.assert_array_equal(base["layers"]["down"]["b"][1], rounded.float())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("int8", "I8"), ("int64", "I64"), ("bool", "BOOL")],
)
def test_types_that_are_no_weights_are_named(folder, dtype, stored):
    name = "encoder.layer.1.output.dense.weight"
    tensors = torch_file.load_file(folder / "model.safetensors")
    torch_file.save_file({**tensors, name: tensors[name].to(getattr(torch, dtype))}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"must hold tensors of F64, F32, F16, BF16, got {stored} of {name} in .*"
    ) as error:
        build(folder)
    assert "\n" not in str(error.value)


def doubled_shards(folder):
    """An index and shards beside the whole file, with weights of their own."""
    other = folder / "other"
    model = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(other, max_shard_size="15KB")
    for path in other.glob("model*"):
        path.rename(folder / path.name)


def test_two_checkpoints_in_one_folder_against_pytorch(folder):
    whole = build(folder)[1]["embeddings"]["word"]
    doubled_shards(folder)
    assert_matches_pytorch(folder)
    np.testing.assert_array_equal(build(folder)[1]["embeddings"]["word"], whole)
    (folder / "model.safetensors").unlink()
    assert_matches_pytorch(folder, tolerance=DOUBLED)
    np.testing.assert_array_equal(build(folder)[1]["embeddings"]["word"], 2 * whole)


def test_a_stale_index_against_pytorch(folder):
    """Beside a whole file it is not read; alone, its shards are, wherever it says that a tensor lies."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"gone": "model-00001-of-00001.safetensors"}}))
    assert_matches_pytorch(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert_matches_pytorch(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold readable files, got .*model-00001-of-00001.safetensors"):
        build(folder)


def test_a_checkpoint_that_the_configuration_names_against_pytorch(folder):
    doubled_shards(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "model.safetensors.index.json"}))
    assert_matches_pytorch(folder, tolerance=DOUBLED)
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "../model.safetensors"}))
    with pytest.raises(ValueError, match=r"must hold ../model.safetensors, got .* without"):
        build(folder)


def test_model_config_hash_is_of_the_computation_alone(folder):
    """Counting: what changes a forward pass changes it, and what does not leaves it."""
    path, config = folder / "config.json", load.ModelConfig(pretrained=str(folder))
    fields = json.loads(path.read_text())

    def hash_with(**changed):
        path.write_text(json.dumps({**fields, **changed}))
        return load.model_config_hash(config)

    plain = hash_with()
    assert hash_with(transformers_version="4.1", id2label={"0": "bad"}, _name_or_path="elsewhere") == plain
    changed = [{"hidden_act": "relu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-5}, {"vocab_size": 30}]
    assert len({plain, *(hash_with(**change) for change in changed)}) == 5
    assert load.model_config_hash(load.ModelConfig()) == ""


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("encoder.layer.1.output.dense.weight", r"\(24, 40\)"),
        ("encoder.layer.0.attention.self.key.weight", r"\(24, 24\)"),
    ],
)
def test_mis_shaped_tensor_is_named(folder, name, stored):
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros((40, 23), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name}.* must be of .*{stored}.*, got .*\(40, 23\)"):
        build(folder)


def test_truncated_file_is_named_in_one_line(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"model.pretrained must hold readable files, got .*model.safetensors"
    ) as error:
        build(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        build(folder)


def test_index_cannot_point_outside_the_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="must map tensors to files beside it"):
        build(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "mamba"}', "must have a model_type among bert.* in config.json, got 'mamba'"),
        ("{}", "must have a model_type among bert.* in config.json, got None and architectures None in "),
        (
            '{"architectures": [3, "BertGenerationDecoder", "Qwen2MoeForCausalLM"]}',
            r"must have a model_type among bert.*, got None and architectures \[3, 'BertGenerationDecoder'",
        ),
        ("{", "must hold a readable config.json"),
        ("[]", "must hold a JSON object in config.json"),
        (
            '{"model_type": "bert", "hidden_act": ["gelu"]}',
            r"^model.pretrained must .* where hidden_act must be one of gelu, .*, got \['gelu'\]",
        ),
        ("[" * 100_000, "must hold a readable config.json"),
        (
            '{"model_type": "bert", "num_attention_heads": 7}',
            "^model.pretrained must .* where num_attention_heads must divide width = 768, got 7",
        ),
        (
            '{"model_type": "bert", "num_hidden_layers": "six"}',
            "^model.pretrained must .* where num_hidden_layers must be an integer from 1 to 1024, got 'six'",
        ),
    ],
)
def test_bad_config_is_refused_in_one_line(folder, content, message):
    (folder / "config.json").write_text(content)
    for load_part in (build, lambda folder: load.load_tokenizer(str(folder))):
        with pytest.raises(ValueError, match=message) as error:
            load_part(folder)
        assert "\n" not in str(error.value)


def test_without_a_model_type_the_names_of_classes_decide(folder):
    """Oracle: the weights of the same folder with its model_type; a class of no family is passed over."""
    (_, expected), fields = build(folder), json.loads((folder / "config.json").read_text())
    fields = {**fields, "model_type": None, "architectures": ["Mine", "BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    jax.tree.map(np.testing.assert_array_equal, build(folder)[1], expected)


def test_names_of_classes_are_those_of_transformers():
    """Oracle: the class that transformers has for each `model_type`."""
    theirs = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    assert list(families.CLASSES.values()) == list(families.FAMILIES)
    assert {name: theirs[name] for name in families.FAMILIES} == {
        name: f"{begins}Model" for begins, name in families.CLASSES.items()
    }
    assert families.model_type(["GPT2LMHeadModel"]) == "gpt2"


def test_neither_folder_nor_hub_id_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder that exists or a Hugging Face model id, got '.*absent'"):
        build(tmp_path / "absent")


def test_model_that_the_hub_does_not_give_is_refused_in_one_line(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(safetensors.huggingface_hub, "snapshot_download", offline)
    message = r"the Hugging Face hub has, got 'someone/some-model' \(no network\); without a network .*HF_HUB_OFFLINE=1"
    with pytest.raises(ValueError, match=message) as error:
        build("someone/some-model")
    assert "\n" not in str(error.value)


def test_hub_id_is_downloaded_without_pickles(folder, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(safetensors.huggingface_hub, "snapshot_download", download)
    build("someone/some-model")
    assert asked == {
        "name": "someone/some-model",
        "allow_patterns": ["*.json", "*.safetensors", "*.txt", "tokenizer.model", "chat_template.jinja"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}'])
def test_damaged_tokenizer_is_refused_in_one_line(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.pretrained must hold a readable tokenizer, got") as error:
        load.load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_folder_without_tokenizer_is_refused_in_one_line(folder):
    with pytest.raises(
        ValueError, match=r"model.pretrained must hold tokenizer.json or vocab.txt or vocab.json with merges.txt"
    ) as error:
        load.load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_save_and_restore_give_the_same_tree_round_trip(tmp_path):
    tree = {
        "base": {"layers": {"up": {"w": jnp.arange(6.0).reshape(2, 3).astype(jnp.bfloat16), "b": jnp.ones(3)}}},
        "head": {"w": jnp.arange(4, dtype=jnp.int32)},
    }
    safetensors.save(tmp_path / "kept.safetensors", tree, {"sha256": "ab"})
    restored, metadata = safetensors.restore(tmp_path / "kept.safetensors")
    assert metadata == {"sha256": "ab"}
    assert jax.tree.structure(tree) == jax.tree.structure(restored)
    jax.tree.map(np.testing.assert_array_equal, tree, restored)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, restored)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "vit"}, "^name must be 'vit-tiny', got 'vit'$"),
        ({"pooling": "max"}, "pooling must be one of mean, cls, last, got 'max'"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of float32, bfloat16, got 'float16'"),
        ({"activation_dtype": "bfloat16"}, "^activation_dtype must be float32 where .* is float32, got 'bfloat16'$"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"pretrained": ""}, "pretrained must be a folder or a Hugging Face model id, got ''"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        load.ModelConfig(**fields)


def test_model_and_data_must_fit(folder):
    with pytest.raises(ValueError, match=r"model.pretrained must be a folder .* for text, got None"):
        load.build_model(load.ModelConfig(), model_context(2))
    with pytest.raises(
        ValueError, match=r"model.pretrained must be a model of images here, since the data are images, got one of text"
    ):
        load.build_model(load.ModelConfig(pretrained=str(folder)), model_context(2, (8, 8, 1)))
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        load.build_model(load.ModelConfig(), model_context(1, (8, 8, 1)))


def test_a_family_of_ones_own_is_made_with_the_task_and_the_adapter_numpy_loop():
    """Oracle: `x (w + s a b)` summed over positions, and the head's product, in NumPy."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OneLayer(Options):
        name: Literal["one-layer"] = "one-layer"
        width: int = 5

    def make(options, context):
        task, adapter = context.made["task"], context.made["adapter"]
        n_in, sites = context.image_shape[2], {"in_proj": Site("inner", 2, context.image_shape[2], 3)}

        def layers(base, adapters, hidden, key):
            placed = {
                name: (sites[name].first, jax.tree.map(lambda x: x[0], f)) for name, f in adapters.modules.items()
            }
            return hidden._replace(values=adapter.project(hidden.values, base["layers"]["inner"]["w"][0], placed))

        return Model(
            init=lambda key: {"layers": {"inner": {"w": jax.random.normal(key, (1, n_in, options.width))}}},
            init_head=lambda key: task.head(key, options.width, True),
            embed=lambda base, batch, key: Hidden(batch["image"].reshape(len(batch["image"]), -1, n_in), jnp.ones(())),
            layers=layers,
            task=lambda base, adapters, hidden, key: task.read(
                adapters.head, Features(hidden, lambda: hidden.values.sum(1))
            ),
            sites=sites,
            num_layers=1,
        )

    method = Method("model", "one-layer", OneLayer, make)
    model, base = load.build_model(OneLayer(), model_context(4, (2, 3, 7)), method.make)
    assert base is None
    base, head = model.init(jax.random.key(0)), model.init_head(jax.random.key(1))
    f = Factors(a=jax.random.normal(jax.random.key(2), (1, 7, 2)), b=jax.random.normal(jax.random.key(3), (1, 2, 3)))
    image = jax.random.normal(jax.random.key(4), (6, 2, 3, 7))
    got = model.apply(base, Adapters(modules={"in_proj": f}, head=head), {"image": image})
    w = np.array(base["layers"]["inner"]["w"][0])
    w[:, 2:] += np.asarray(f.a[0]) @ np.asarray(f.b[0])
    expected = np.asarray(image).reshape(6, 6, 7).sum(1) @ w @ np.asarray(head["w"]) + np.asarray(head["b"])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    merged = lora.merge(base, Adapters(modules={"in_proj": f}, head={}), model.sites)
    np.testing.assert_allclose(merged["layers"]["inner"]["w"][0], w, rtol=1e-5, atol=1e-6)


def test_every_frozen_weight_has_its_place_in_a_checkpoint_and_sites_lie_in_their_matrices(folder):
    """Oracle: the shapes of the folder's tensors, by the names that the sites state."""
    found = load.read_pretrained(load.ModelConfig(pretrained=str(folder)), str(folder))
    shape, base, rows = found.shape, found.weights(), found.family.weights(found.shape)
    tensors = load_file(folder / "model.safetensors")
    sites = table.sites(rows)
    assert list(sites) == ["query", "key", "value", "output", "up", "down"]
    for site in sites.values():
        for layer in range(shape.num_layers):
            stored = tensors[site.source.format(layer=layer) + ".weight"]
            columns = base["layers"][site.group]["w"][layer, :, site.first : site.first + site.n_out]
            np.testing.assert_array_equal(columns, stored.T)
            assert columns.shape == (site.n_in, site.n_out)


def test_rounded_matrices_are_a_property_that_the_options_break():
    assert load.ModelConfig(compute_dtype="bfloat16").breaks() == {"float32_base": "compute_dtype"}
    assert load.ModelConfig().breaks() == {}


def test_a_model_with_code_of_its_own_is_refused(folder):
    fields = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.XModel"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"without code of its own \(trust_remote_code\), got auto_map in"):
        build(folder)


def test_a_model_type_and_classes_of_another_family_are_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    for classes in ([], ["BertForPreTraining"], ["Odd", "BertOfMyOwn"]):
        (folder / "config.json").write_text(json.dumps({**fields, "model_type": "bert", "architectures": classes}))
        load.read_shape(str(folder))
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "bert", "architectures": ["T5Model"]}))
    with pytest.raises(
        ValueError, match=r"^model.pretrained must have architectures of its model_type 'bert' in .* got \['T5"
    ):
        load.read_shape(str(folder))


def test_a_pickle_is_named_and_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"without, but pytorch_model.bin, a pickle, which is never read$"):
        safetensors.tensor_files(folder)


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_a_shard_outside_of_the_folder_is_named(folder, outside):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"embeddings.word_embeddings.weight": outside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"beside it in .*, got {re.escape(repr(outside))} for 'embeddings.word_emb"):
        safetensors.tensor_files(folder)


def test_a_model_of_images_where_there_is_text_is_refused(tmp_path):
    """Before the text is read, which such a model has no table of positions for."""
    transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, image_size=4, patch_size=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"^model.pretrained must be a model of text here, since the data are text, got one"
    ):
        load.check_inputs(load.read_shape(str(tmp_path)), str(tmp_path), None)


def test_quantized_weights_are_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(
        ValueError, match=r"weights that are not quantized, got a quantization_config in config.json of "
    ):
        build(folder)
