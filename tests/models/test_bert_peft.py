"""LoRA on BERT, against PyTorch with PEFT: loss, gradients and one step of gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from fedjax_lora.base import Adapters, Factors
from fedjax_lora.lora import adapters as lora
from fedjax_lora.models import bert, load

RANK, ALPHA, RATE = 3, 6.0, 0.5
PEFT_TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
MODULES = ("query", "value", "output", "up", "down")


def torch_name(module, layer):
    return "base_model.model.bert." + bert.MODULE_NAMES[module].format(layer=layer)


def random_adapters(model):
    modules = lora.init(jax.random.key(1), {name: model.targets[name] for name in MODULES}, 2, RANK)
    keys = iter(jax.random.split(jax.random.key(2), len(MODULES)))
    modules = {
        name: Factors(a=factors.a, b=0.3 * jax.random.normal(next(keys), factors.b.shape))
        for name, factors in modules.items()
    }
    return Adapters(modules=modules, head={"w": jax.random.normal(jax.random.key(3), (24, 2)), "b": jnp.ones(2)})


def peft_model(folder, adapters):
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PEFT_TARGETS
    )
    model = peft.get_peft_model(model, config).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module, factors in adapters.modules.items():
            for layer in range(2):
                for side, leaf in (("A", factors.a), ("B", factors.b)):
                    name = f"{torch_name(module, layer)}.lora_{side}.default.weight"
                    parameters[name].copy_(torch.tensor(np.asarray(leaf[layer]).T))
        head = "base_model.model.classifier.modules_to_save.default"
        parameters[f"{head}.weight"].copy_(torch.tensor(np.asarray(adapters.head["w"]).T))
        parameters[f"{head}.bias"].copy_(torch.tensor(np.asarray(adapters.head["b"])))
    return model


def read_torch(get):
    """Adapters from what `get` returns for each PEFT parameter's name."""
    modules = {
        module: Factors(
            **{
                field: np.stack([get(f"{torch_name(module, i)}.lora_{side}.default.weight").T for i in range(2)])
                for field, side in (("a", "A"), ("b", "B"))
            }
        )
        for module in MODULES
    }
    head = "base_model.model.classifier.modules_to_save.default"
    return Adapters(modules=modules, head={"w": get(f"{head}.weight").T, "b": get(f"{head}.bias")})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_loss_gradients_and_a_step_against_peft(tmp_path):
    shape = transformers.BertConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(shape).save_pretrained(tmp_path)
    model, base = load.build_model(load.ModelConfig(pretrained=str(tmp_path), pooling="cls"), 2)
    adapters = random_adapters(model)
    random = np.random.default_rng(0)
    ids, label = random.integers(1, 31, (4, 10)), np.array([0, 1, 1, 0])
    attention_mask = (np.arange(10) < np.array([10, 4, 7, 9])[:, None]).astype(np.int64)

    reference = peft_model(tmp_path, adapters)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=RATE)
    expected_loss = reference(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(attention_mask), labels=torch.tensor(label)
    ).loss
    expected_loss.backward()
    parameters = dict(reference.named_parameters())
    expected_gradient = read_torch(lambda name: parameters[name].grad.numpy().copy())
    optimizer.step()
    expected_step = read_torch(lambda name: parameters[name].detach().numpy())

    def loss(adapters):
        effective = lora.effective(adapters, lora.rank_mask(RANK, RANK), ALPHA / RANK)
        batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(attention_mask)}
        return -jnp.take_along_axis(jax.nn.log_softmax(model.apply(base, effective, batch)), label[:, None], 1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)
    step = jax.tree.map(lambda p, g: p - RATE * g, adapters, gradient)
    np.testing.assert_allclose(value, expected_loss.item(), rtol=1e-5)
    for got, expected in ((gradient, expected_gradient), (step, expected_step)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, expected)
