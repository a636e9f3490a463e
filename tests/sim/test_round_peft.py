"""A round of dense FedIT without a network, against a loop over clients in PyTorch with PEFT, on the same batches."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import fedjax_lora as fl
from fedjax_lora.core.keys import client_keys, round_keys
from fedjax_lora.core.types import IGNORED, Adapters, Factors
from fedjax_lora.data import packing
from fedjax_lora.data.batches import local_batches
from fedjax_lora.data.sources import arrays
from fedjax_lora.models import load, table
from fedjax_lora.models.families import FAMILIES
from oracles import tiny_models

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT

CLIENTS, STEPS, BATCH, LENGTH, RANK, ALPHA, RATE = 3, 2, 4, 10, 3, 6, 0.2


class Case(NamedTuple):
    """Task, targets by our names, the class of transformers, its head, and whether it holds matrices as ours."""

    task: str
    targets: list[str]
    cls: type
    head: str = ""
    turned: bool = False


CASES = {
    "bert": Case(
        "classification", ["query", "output", "down"], transformers.BertForSequenceClassification, "classifier"
    ),
    "gpt2": Case("causal_lm", ["c_attn", "attn.c_proj", "c_fc"], transformers.GPT2LMHeadModel, turned=True),
    "llama": Case("causal_lm", ["q_proj", "v_proj", "o_proj", "down_proj"], transformers.LlamaForCausalLM),
}


class Patterns(NamedTuple):
    """Ranks and alphas of single modules, by names as PEFT has them."""

    ranks: dict[str, int]
    alphas: dict[str, float]


NONE = Patterns({}, {})
PATTERNS = {
    "bert": Patterns(
        {"layer.1.attention.self.query": 1, "0.attention.output.dense": 4, ".*layer.1.output.dense": 2}, {"query": 7.5}
    ),
    "llama": Patterns({r".*\.0\.self_attn\.[qv]_proj": 5, "q_proj": 2}, {}),
}
"""Of which some name modules that another one names too, the first of them decides."""


def pool(size, seed):
    """Of several lengths; the labels are unequal, so that clients hold unequal numbers."""
    random = np.random.default_rng(seed)
    real = np.arange(LENGTH) < random.integers(2, LENGTH + 1, size)[:, None]
    ids = np.where(real, random.integers(1, tiny_models.VOCABULARY, (size, LENGTH)), 0)
    follows = np.pad(np.where(real[:, 1:], ids[:, 1:], IGNORED), ((0, 0), (0, 1)), constant_values=IGNORED)
    label = (random.random(size) < 0.3).astype(int)
    return {"input_ids": ids, "attention_mask": real.astype(int), "target": follows, "label": label}


class Peer:
    """A model of transformers with PEFT's adapters, whose values are set and read by our names."""

    def __init__(self, folder, name, patterns):
        self._case = case = CASES[name]
        sites = table.sites(FAMILIES[name].weights(load.read_shape(str(folder))))
        self._sources = {target: sites[target].source for target in case.targets}
        prefix = FAMILIES[name].classes[case.task].prefix
        self._prefix = f"base_model.model.{prefix}"
        whole = [prefix + source.format(layer=i) for source in self._sources.values() for i in range(2)]
        config = peft.LoraConfig(
            task_type="CAUSAL_LM" if case.task == "causal_lm" else "SEQ_CLS",
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=whole, fan_in_fan_out=case.turned,
            rank_pattern=patterns.ranks, alpha_pattern=patterns.alphas,
        )  # fmt: skip
        model = case.cls.from_pretrained(folder, **({} if not case.head else {"num_labels": 2}))
        self._model = peft.get_peft_model(model, config).eval()  # no dropout
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    def _leaves(self, adapters):
        """Parameter and our values of it, of as many components as it has; ours are zero beyond them."""
        for target, factors in adapters.modules.items():
            for layer in range(2):
                name = self._prefix + self._sources[target].format(layer=layer)
                a, b = (self._trained[f"{name}.lora_{side}.default.weight"] for side in "AB")
                rank, own_a, own_b = len(a), np.asarray(factors.a[layer]), np.asarray(factors.b[layer])
                assert not own_a[:, rank:].any() and not own_b[rank:].any()
                yield a, own_a[:, :rank].T
                yield b, own_b[:rank].T
        if self._case.head:
            module = f"base_model.model.{self._case.head}.modules_to_save.default"
            yield self._trained[f"{module}.weight"], np.asarray(adapters.head["w"]).T
            yield self._trained[f"{module}.bias"], np.asarray(adapters.head["b"])

    def set(self, adapters):
        """Start from these; all that is trained is among them."""
        with torch.no_grad():
            pairs = list(self._leaves(adapters))
            assert len(pairs) == len(self._trained)
            for parameter, leaf in pairs:
                parameter.copy_(torch.tensor(leaf))

    def beside(self, adapters):
        """Pairs of its own values and of ours."""
        return [(p.detach().numpy().copy(), leaf) for p, leaf in self._leaves(adapters)]

    def loss(self, batch):
        """As transformers has it: of a language model, it is given the tokens themselves, and finds what follows."""
        ids, mask, label = (torch.tensor(batch[name]).long() for name in ("input_ids", "attention_mask", "label"))
        labels = torch.where(mask > 0, ids, -100) if self._case.task == "causal_lm" else label
        return self._model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def train(self, batches):
        """Mean loss of steps of SGD."""
        optimizer, losses = torch.optim.SGD(self._trained.values(), lr=RATE), []
        for batch in batches:
            loss = self.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.mean(losses)


def simulation(folder, name, patterns):
    case, names = CASES[name], ("no", "yes")
    source = arrays("mine", train=pool(50, 0), test=pool(9, 1), class_names=names)
    settings = [
        "rounds=1",
        "data.source=mine",
        f"task={case.task}",
        f"model={{pretrained: {folder}, pooling: cls}}",
        f"lora={{targets: [{', '.join(case.targets)}], rank: {RANK}, alpha: {ALPHA}}}",
        f"lora.max_rank={max([RANK, *patterns.ranks.values()])}",
        f"lora.rank_pattern={json.dumps(patterns.ranks)}",
        f"lora.alpha_pattern={json.dumps(patterns.alphas)}",
        f"clients={{count: {CLIENTS}, partition: {{alpha: 0.5}}}}",
        f"local={{steps: {STEPS}, batch_size: {BATCH}, optimizer: {{name: sgd, learning_rate: {RATE}}}}}",
        "sparsifier=dense",
        "control=ideal",
        "engine={eval_every: 1, eval_batch_size: 9, client_chunk: 1}",
    ]
    return fl.build(fl.load_config(None, settings, methods=[source]), methods=[source])


def with_random_factors(state):
    """The state with a second factor that is not 0, so that both are trained from the first step."""
    keys = iter(jax.random.split(jax.random.key(5), 10))
    modules = {}
    for name, f in state.adapters.modules.items():
        has = jnp.any(f.a != 0, axis=1)[:, :, None]
        modules[name] = Factors(a=f.a, b=0.3 * has * jax.random.normal(next(keys), f.b.shape))
    return dataclasses.replace(state, adapters=Adapters(modules=modules, head=state.adapters.head))


def batches_of_clients(sim, state):
    """The batches that the next round reads, of each client, without the places that are left over."""
    data = sim.world.data
    keys = client_keys(round_keys(state.key, state.round).local, jnp.arange(CLIENTS))
    for number, key in enumerate(keys):
        order_key, _ = jax.random.split(key)
        rows, weight = local_batches(order_key, data.index[number], data.count[number], STEPS, BATCH)
        yield [
            {n: np.asarray(leaf)[r[w > 0]] for n, leaf in data.train.items()} for r, w in zip(rows, weight, strict=True)
        ]


@pytest.fixture(autouse=True)
def few_widths(monkeypatch):
    """Each is a program more to compile."""
    monkeypatch.setattr(packing, "WIDTHS", 1)


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, patterns" for name in PATTERNS)])
def test_a_round_is_that_of_peft(name, tmp_path):
    """Averaged factors, head, and losses of training and of the held-out pool."""
    name, patterned, _ = name.partition(", patterns")
    case, patterns = CASES[name], PATTERNS[name] if patterned else NONE
    torch.manual_seed(0)
    tiny_models.save(tmp_path, case.cls(tiny_models.CONFIGS[name]))
    sim, peer = simulation(tmp_path, name, patterns), Peer(tmp_path, name, patterns)
    state = with_random_factors(sim.init(jax.random.key(5)))
    after, metrics = sim.run(state, 1)

    count = np.asarray(sim.world.data.count)
    assert len(set(count.tolist())) > 1
    average, losses = None, []
    for number, batches in enumerate(batches_of_clients(sim, state)):
        peer.set(state.adapters)
        losses.append(peer.train(batches))
        share = [count[number] / count.sum() * own for own, _ in peer.beside(state.adapters)]
        average = share if average is None else [x + y for x, y in zip(average, share, strict=True)]
    assert average is not None
    for expected, (_, leaf), (_, first) in zip(
        average, peer.beside(after.adapters), peer.beside(state.adapters), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-4)
        assert np.abs(leaf - first).max() > 1e-3  # it has moved by more than that
    np.testing.assert_allclose(metrics.train_loss[0], np.mean(losses), rtol=1e-4)
    peer.set(after.adapters)
    held_out = peer.loss(jax.tree.map(np.asarray, sim.world.data.test)).item()
    np.testing.assert_allclose(metrics.eval_loss[0], held_out, rtol=1e-4)
