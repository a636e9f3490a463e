"""GPT-2 against PyTorch: logits of the next token, and gradients of LoRA against PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedjax_lora.adapters import lora, targets
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import load
from fedjax_lora.tasks.classification import cross_entropy
from oracles import tiny_models
from oracles.model_context import model_context

torch = pytest.importorskip("torch")

RANK, ALPHA = 3, 6.0
HEAD = "base_model.model.score.modules_to_save.default.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model with the buffers that older checkpoints hold."""
    path = tmp_path_factory.mktemp("gpt2")
    model = tiny_models.save(path, transformers.GPT2LMHeadModel(tiny_models.CONFIGS["gpt2"]))
    tensors = load_file(path / "model.safetensors")
    for layer in range(tiny_models.LAYERS):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.tri(16, dtype=np.float32)[None, None]
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.float32([-1e4])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path, model


def test_logits_of_the_next_token_against_pytorch(folder):
    path, reference = folder
    batch = tiny_models.text_batch()
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(leaf) for name, leaf in batch.items()}).logits.numpy()
    np.testing.assert_allclose(tiny_models.outputs(path, batch)["logits"], expected, atol=1e-4, rtol=0)


def test_bfloat16_logits_are_near_float32(folder):
    batch = tiny_models.text_batch()
    full, low = (tiny_models.outputs(folder[0], batch, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    for name in ("hidden", "logits"):
        assert low[name].dtype == jnp.float32
        assert jnp.linalg.norm(low[name] - full[name]) < 0.03 * jnp.linalg.norm(full[name])


def by_peft_name(adapters, sites):
    """Leaves by the name of PEFT's parameter that each is the transpose of."""
    return {HEAD: adapters.head["w"]} | {
        f"base_model.model.transformer.{sites[name].source.format(layer=layer)}.lora_{side}.default.weight": leaf[layer]
        for name, factors in adapters.modules.items()
        for side, leaf in (("A", factors.a), ("B", factors.b))
        for layer in range(tiny_models.LAYERS)
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_gradients_of_lora_on_all_modules_against_peft(folder):
    peft = pytest.importorskip("peft")
    model, base = load.build_model(load.ModelConfig(pretrained=str(folder[0]), pooling="last"), model_context(2))
    sites = targets.choose(("c_attn", "c_proj", "c_fc"), model.sites, model.num_layers)
    modules = {
        name: Factors(a=f.a, b=0.3 * jax.random.normal(jax.random.key(2), f.b.shape))
        for name, f in lora.init(jax.random.key(1), sites, model.num_layers, RANK).items()
    }
    adapters = Adapters(modules=modules, head={"w": jax.random.normal(jax.random.key(3), (tiny_models.WIDTH, 2))})

    plain = transformers.GPT2ForSequenceClassification.from_pretrained(folder[0], num_labels=2)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    reference = peft.get_peft_model(plain, config).eval()
    parameters = dict(reference.named_parameters())
    start = by_peft_name(adapters, sites)
    assert start.keys() == {name for name, parameter in parameters.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, leaf in start.items():
            parameters[name].copy_(torch.tensor(np.asarray(leaf).T))
    batch, label = tiny_models.text_batch(), np.array([0, 1, 1])
    batch["input_ids"][0, 3] = 5  # PyTorch looks for the last token before padding
    tensors = {name: torch.tensor(leaf) for name, leaf in batch.items()}
    expected_loss = reference(**tensors, labels=torch.tensor(label)).loss
    expected_loss.backward()

    def loss(adapters):
        effective = lora.effective(adapters, lora.rank_mask(RANK, RANK), ALPHA / RANK)
        return cross_entropy(model.apply(base, effective, batch), label, jnp.ones(3))

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)
    np.testing.assert_allclose(value, expected_loss.item(), rtol=1e-5)
    for name, leaf in by_peft_name(gradient, sites).items():
        np.testing.assert_allclose(leaf.T, parameters[name].grad.numpy(), rtol=1e-4, atol=1e-4)
