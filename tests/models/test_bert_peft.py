"""Local training of LoRA on BERT, against PyTorch with PEFT: loss, gradients, steps and regulariser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_lora.adapters import lora
from fedjax_lora.aggregation import fedit
from fedjax_lora.core.exchange import Live
from fedjax_lora.core.learning import Broadcast, Client
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.models import bert, load, table
from fedjax_lora.sparsifiers import dense, soft
from fedjax_lora.tasks.classification import cross_entropy
from fedjax_lora.training import local
from fedjax_lora.training.corrections import NoDriftConfig, no_correction
from fedjax_lora.training.optimizers import OptimizerConfig
from oracles.model_context import model_context

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

RANK, ALPHA, RATE = 3, 6.0, 0.5
PEFT_TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
MODULES = ("query", "value", "output", "up", "down")


def torch_name(module, layer):
    return "base_model.model.bert." + table.sites(bert.weights(bert.BertConfig()))[module].source.format(layer=layer)


def random_adapters(model):
    modules = lora.init(jax.random.key(1), {name: model.sites[name] for name in MODULES}, 2, RANK)
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


BATCH = {
    "input_ids": np.random.default_rng(0).integers(1, 31, (4, 10)),
    "attention_mask": (np.arange(10) < np.array([10, 4, 7, 9])[:, None]).astype(np.int64),
    "label": np.array([0, 1, 1, 0]),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A small BERT whose perceptron is not square: its folder, our model and weights, and adapters."""
    folder = tmp_path_factory.mktemp("bert")
    shape = transformers.BertConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(shape).save_pretrained(folder)
    model, base = load.build_model(load.ModelConfig(pretrained=str(folder), pooling="cls"), model_context(2))
    return folder, model, base, random_adapters(model)


def torch_loss(reference):
    inputs = {name: torch.tensor(value) for name, value in BATCH.items()}
    return reference(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["label"]
    ).loss


def parameters_of(reference):
    parameters = dict(reference.named_parameters())
    return read_torch(lambda name: parameters[name].detach().numpy().copy())


def train(setting, sparsifier_config, optimizer, steps, round_number=0):
    """The engine's own local training of one client that holds exactly the batch."""
    _, model, base, adapters = setting
    context = model_context(2)._replace(
        rounds=2, local=local.LocalConfig(steps=steps, batch_size=5, optimizer=optimizer), like=adapters
    )
    make_sparsifier = soft.make if isinstance(sparsifier_config, soft.SoftConfig) else dense.make
    made = {
        "model": model,
        "drift": no_correction(NoDriftConfig(), context),
        "sparsifier": make_sparsifier(sparsifier_config, context),
        "aggregation": fedit.make(fedit.FedItConfig(), context),
    }
    trainer = local.make(local.LocalTrainingOptions(), context._replace(made={**context.made, **made}))
    # The client holds the four examples; two more places of its table are padding.
    client = Client(
        rows=jnp.array([0, 1, 2, 3, 0, 0]),
        examples=jnp.int32(4),
        key=jax.random.key(4),
        rank=jnp.float32(RANK),
        personal={},
        methods={"drift": (), "aggregation": ()},
    )
    given = Broadcast(
        base=base,
        pool={name: jnp.asarray(value) for name, value in BATCH.items()},
        adapters=adapters,
        live=Live(*map(jnp.float32, Live())),
        correction=(),
        scale=jnp.float32(ALPHA / RANK),
        round=jnp.int32(round_number),
    )
    return jax.jit(trainer.train)(given, client)


def assert_close(got, expected, rtol, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_gradients_and_one_sgd_step_of_local_training_against_peft(setting):
    folder, model, base, adapters = setting
    reference = peft_model(folder, adapters)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=RATE)
    expected_loss = torch_loss(reference)
    expected_loss.backward()
    parameters = dict(reference.named_parameters())
    expected_gradient = read_torch(lambda name: parameters[name].grad.numpy().copy())
    optimizer.step()

    def loss(adapters):
        effective = lora.effective(adapters, lora.rank_mask(RANK, RANK), ALPHA / RANK)
        return cross_entropy(model.apply(base, effective, BATCH), BATCH["label"], jnp.ones(4))

    assert_close(jax.jit(jax.grad(loss))(adapters), expected_gradient, rtol=1e-5, atol=1e-5)
    trained = train(setting, dense.DenseConfig(), OptimizerConfig(name="sgd", learning_rate=RATE), steps=1)
    np.testing.assert_allclose(trained.loss, expected_loss.item(), rtol=1e-5)
    assert_close(trained.adapters, parameters_of(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adamw_with_a_linear_schedule_in_the_second_round_against_torch(setting):
    reference = peft_model(setting[0], setting[3])
    trainable = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1.0, weight_decay=0.1)
    for factor in (0.5, 0.25):  # steps 2 and 3 of 4
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        optimizer.zero_grad()
        torch_loss(reference).backward()
        optimizer.step()
    config = OptimizerConfig(name="adamw", learning_rate=0.01, schedule="linear", weight_decay=0.1)
    trained = train(setting, dense.DenseConfig(), config, steps=2, round_number=1)
    assert_close(trained.adapters, parameters_of(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_regulariser_of_soft_enters_the_step_as_in_torch(setting):
    reference = peft_model(setting[0], setting[3])
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.05)
    loss = torch_loss(reference)
    for name, p in reference.named_parameters():
        if ".lora_" in name:
            columns = p.T if ".lora_A." in name else p
            gram = columns.T @ columns
            loss = loss + 0.3 * ((gram - torch.diag(torch.diag(gram))) ** 2).sum()
    loss.backward()
    optimizer.step()
    config = OptimizerConfig(name="sgd", learning_rate=0.05)
    trained = train(setting, soft.SoftConfig(orthogonality=0.3), config, steps=1)
    assert_close(trained.adapters, parameters_of(reference), rtol=1e-4, atol=1e-5)
