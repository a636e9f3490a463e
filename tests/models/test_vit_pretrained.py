"""ViT and DeiT of Hugging Face folders against PyTorch, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.core.types import Adapters
from fedjax_lora.models import load, table
from oracles import tiny_models
from oracles.model_context import model_context

torch = pytest.importorskip("torch")

IMAGE_SHAPE = (4, 6, 3)
CLASSES = {"vit": transformers.ViTForImageClassification, "deit": transformers.DeiTForImageClassification}


def images():
    return np.random.default_rng(0).uniform(-1, 1, (3, *IMAGE_SHAPE)).astype(np.float32)


def pytorch(model, image):
    with torch.no_grad():
        return model(torch.tensor(image.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", params=CLASSES)
def setting(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_models.CONFIGS[request.param]
    return folder, tiny_models.save(folder, CLASSES[request.param](config)), request.param


def test_logits_with_the_same_head_against_pytorch(setting):
    folder, reference, _ = setting
    config = load.ModelConfig(pretrained=str(folder), pooling="cls")
    model, base = load.build_model(config, model_context(5, IMAGE_SHAPE))
    head = {
        "w": jnp.asarray(reference.classifier.weight.detach().numpy().T),
        "b": jnp.asarray(reference.classifier.bias.detach().numpy()),
    }
    image = images()
    got = jax.jit(model.apply)(base, Adapters(modules={}, head=head), {"image": jnp.asarray(image)})
    np.testing.assert_allclose(got, pytorch(reference, image).logits.numpy(), atol=1e-4, rtol=0)


def test_hidden_states_and_their_mean_against_pytorch(setting):
    folder, reference, name = setting
    image = images()
    expected = pytorch(getattr(reference, name), image).last_hidden_state.numpy()
    got = tiny_models.outputs(folder, {"image": image}, IMAGE_SHAPE)
    assert got["hidden"].shape == (3, 7 if name == "vit" else 8, tiny_models.WIDTH)
    np.testing.assert_allclose(got["hidden"], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got["pooled"], expected.mean(1), atol=1e-4, rtol=0)


def test_every_weight_goes_back_to_a_checkpoint_that_pytorch_reads(setting, tmp_path):
    """Round trip, through PyTorch and through ours."""
    folder, reference, name = setting
    found = load.read_pretrained(load.ModelConfig(pretrained=str(folder)), str(folder))
    tensors = table.tensors(found.family.weights(found.shape), found.weights())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    read = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).state_dict()
    own = getattr(reference, name).state_dict()
    assert tensors.keys() == read.keys() == own.keys()
    for key, leaf in read.items():
        np.testing.assert_array_equal(leaf.numpy(), own[key].numpy())
    again = load.read_pretrained(load.ModelConfig(pretrained=str(tmp_path)), str(tmp_path)).weights()
    jax.tree.map(np.testing.assert_array_equal, again, found.weights())


def test_a_pooler_and_a_mask_token_are_left_out(setting, tmp_path):
    folder, _, name = setting
    tensors = load_file(folder / "model.safetensors")
    extra = {"pooler.dense.weight": np.ones((24, 24)), "embeddings.mask_token": np.ones((1, 1, 24))}
    tensors |= {f"{name}.{key}": np.float32(leaf) for key, leaf in extra.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    base = load.read_pretrained(load.ModelConfig(pretrained=str(tmp_path)), str(tmp_path)).weights()
    assert "pooler" not in base


def test_images_of_another_shape_are_refused(setting):
    folder, config = setting[0], load.ModelConfig(pretrained=str(setting[0]))
    message = r"must read images of \(6, 4, 3\), height, width and channels of the data, got \(4, 6, 3\) in config.json"
    with pytest.raises(ValueError, match=message):
        load.build_model(config, model_context(2, (6, 4, 3)))
    with pytest.raises(ValueError, match=rf"must be a model of text .*, since the data are text, .*: '{folder}'"):
        load.build_model(config, model_context(2))


def test_images_are_normalised_as_the_folder_says(tmp_path):
    """Oracle: the image processor of transformers, on images in [0, 1]."""
    config = tiny_models.CONFIGS["vit"]
    reference = tiny_models.save(tmp_path, transformers.ViTModel(config, add_pooling_layer=False))
    settings = {"do_resize": False, "do_rescale": False, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    image, processor = np.abs(images()), transformers.ViTImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    pixels = processor(list(image), return_tensors="pt", input_data_format="channels_last").pixel_values
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state.numpy()
    got = tiny_models.outputs(tmp_path, {"image": image}, IMAGE_SHAPE)
    np.testing.assert_allclose(got["hidden"], expected, atol=1e-4, rtol=0)


def test_a_mean_of_other_channels_is_refused(tmp_path):
    tiny_models.save(tmp_path, transformers.ViTModel(tiny_models.CONFIGS["vit"]))
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_normalize": true, "image_mean": [0.5], "image_std": [1.0]}'
    )
    with pytest.raises(ValueError, match=r"image_mean must be of 3 channels, got \(0.5,\)"):
        load.read_shape(str(tmp_path))
