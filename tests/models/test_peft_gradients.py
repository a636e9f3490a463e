"""Gradients of LoRA on all linear modules of the families that have no tests of their own, against PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.adapters import lora
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import load
from fedjax_lora.tasks.classification import cross_entropy
from oracles import tiny_models
from oracles.model_context import model_context

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

RANK, ALPHA, CLASSES = 3, 6.0, 3
LABEL = np.array([0, 2, 1])
NAMES = [name for name in tiny_models.CONFIGS if name not in ("bert", "gpt2", "llama")]


def batch_of(config):
    """Sentences, or images whose sides differ."""
    if hasattr(config, "image_size"):
        return {"image": np.random.default_rng(0).random((3, *config.image_size, config.num_channels), np.float32)}
    return tiny_models.text_batch(config.pad_token_id or 0)


def random_adapters(model):
    """Adapters on all modules, whose b is not the 0 that it starts from, and a head."""
    keys = iter(jax.random.split(jax.random.key(1), len(model.sites) + 2))
    start = lora.init(next(keys), model.sites, model.num_layers, RANK)
    modules = {name: Factors(a=f.a, b=0.1 * jax.random.normal(next(keys), f.b.shape)) for name, f in start.items()}
    return Adapters(modules=modules, head={"w": jax.random.normal(next(keys), (tiny_models.WIDTH, CLASSES))})


def by_peft_name(modules, sites):
    """Leaves by the name of PEFT's parameter that each is the transpose of."""
    return {
        f"base_model.model.{sites[name].source.format(layer=layer)}.lora_{side}.default.weight": leaf[layer]
        for name, factors in modules.items()
        for side, leaf in (("A", factors.a), ("B", factors.b))
        for layer in range(tiny_models.LAYERS)
    }


def with_peft(folder, start, sites):
    """PyTorch's model of a folder with these adapters; what is trained is what is given."""
    ends = {site.source.partition("{layer}")[2].removeprefix(".") for site in sites.values()}
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=rf".*\.\d+\.({'|'.join(sorted(ends))})")
    reference = peft.get_peft_model(transformers.AutoModel.from_pretrained(folder), config).eval()
    parameters = {name: leaf for name, leaf in reference.named_parameters() if leaf.requires_grad}
    assert start.keys() == parameters.keys()
    with torch.no_grad():
        for name, leaf in start.items():
            parameters[name].copy_(torch.tensor(np.asarray(leaf).T))
    return reference, parameters


def torch_loss(reference, batch, head):
    """Cross-entropy of a head on the mean of the real positions."""
    if "image" in batch:
        hidden = reference(pixel_values=torch.tensor(batch["image"]).permute(0, 3, 1, 2)).last_hidden_state
        mask = torch.ones(hidden.shape[:2])
    else:
        inputs = {name: torch.tensor(leaf) for name, leaf in batch.items()}
        hidden, mask = reference(**inputs).last_hidden_state, inputs["attention_mask"]
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.cross_entropy(pooled @ head, torch.tensor(LABEL))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_the_factors_and_the_head_against_peft(name, tmp_path):
    config = tiny_models.CONFIGS[name]
    tiny_models.save(tmp_path, transformers.AutoModel.from_config(config))
    batch = batch_of(config)
    context = model_context(CLASSES, batch["image"].shape[1:] if "image" in batch else None)
    model, base = load.build_model(load.ModelConfig(pretrained=str(tmp_path)), context)
    adapters = random_adapters(model)

    def loss(adapters):
        effective = lora.effective(adapters, lora.rank_mask(RANK, RANK), ALPHA / RANK)
        return cross_entropy(model.apply(base, effective, batch), LABEL, jnp.ones(len(LABEL)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)

    reference, parameters = with_peft(tmp_path, by_peft_name(adapters.modules, model.sites), model.sites)
    head = torch.tensor(np.asarray(adapters.head["w"])).requires_grad_()
    expected = torch_loss(reference, batch, head)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient.head["w"], head.grad.numpy(), rtol=0, atol=1e-4)
    for parameter, leaf in by_peft_name(gradient.modules, model.sites).items():
        theirs = parameters[parameter].grad.numpy().T
        assert np.abs(theirs).max() > 1e-3  # what is compared is not nothing
        np.testing.assert_allclose(leaf, theirs, rtol=0, atol=1e-4, err_msg=parameter)
