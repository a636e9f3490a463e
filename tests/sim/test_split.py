"""Split training: against ordinary federated LoRA, against NumPy with the same rounding, and bits by hand."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedjax_lora.adapters.lora import effective, rank_mask
from fedjax_lora.app.planner import NEEDS
from fedjax_lora.app.sweep import sweep_network
from fedjax_lora.config.catalogue import Catalogue, check_needs
from fedjax_lora.config.experiment import ConfigError, dump
from fedjax_lora.core.learning import Hidden, Model
from fedjax_lora.core.methods import Context
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.io import checkpoint
from fedjax_lora.io.log import RunFolder
from fedjax_lora.models import bert, vit
from fedjax_lora.training import split
from fedjax_lora.training.split import SplitOptions, cut_model
from oracles.model_context import model_context
from toy import config, simulation

PARTS = model_context(2).made
BERT = bert.BertConfig(vocab_size=31, width=12, num_layers=3, num_heads=3, mlp_width=20, max_positions=8)
VIT = vit.VitConfig(height=4, width=4, patch=2, hidden=12, num_layers=3, num_heads=3, mlp_width=20)
FAMILIES = {
    "bert": bert.bert(BERT, PARTS["task"], PARTS["adapter"]),
    "vit": vit.vit(VIT, PARTS["task"], PARTS["adapter"]),
}
CUTS = [cut for cut in itertools.product(range(3), repeat=2) if sum(cut) < 3]


def batch_of(family):
    random = np.random.default_rng(0)
    label = jnp.asarray([0, 1, 1])
    if family == "vit":
        return {"image": jnp.asarray(random.uniform(size=(3, 4, 4, 1)), jnp.float32), "label": label}
    ids = jnp.asarray(random.integers(1, 31, (3, 8)), jnp.int32)
    mask = jnp.asarray(np.arange(8) < np.array([8, 3, 5])[:, None], jnp.int32)
    return {"input_ids": ids, "attention_mask": mask, "label": label}


def adapters_of(model):
    random = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(0.3 * random.normal(size=shape), jnp.float32)

    modules = {
        name: Factors(a=normal(3, site.n_in, 2), b=normal(3, 2, site.n_out))
        for name, site in model.sites.items()
        if name in ("query", "up")
    }
    return Adapters(modules=modules, head={"w": normal(12, 2), "b": normal(2)})


def gradient_of(model, family):
    batch, base = batch_of(family), model.init(jax.random.key(0))

    def loss(adapters):
        outputs = model.apply(base, effective(adapters, rank_mask(2, 2), 1.5), batch, None)
        return PARTS["task"].loss(outputs, batch, jnp.ones(3))

    return jax.jit(jax.value_and_grad(loss))(adapters_of(model))


def assert_near(found, expected):
    """To 1e-5 of the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("device_layers", "tail_layers"), CUTS)
def test_a_step_is_that_of_the_whole_model_at_every_cut(family, device_layers, tail_layers):
    """Oracle: the same model uncut; loss and all gradients."""
    model = FAMILIES[family]
    options = SplitOptions(device_layers=device_layers, tail_layers=tail_layers)
    found, expected = gradient_of(cut_model(options, model), family), gradient_of(model, family)
    jax.tree.map(assert_near, found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_first_layers_are_frozen_no_gradient_comes_back(family):
    """By definition: zero for their adapters, the whole model's for the others."""
    model = FAMILIES[family]
    options = SplitOptions(device_layers=1, device_adapters="frozen")
    (_, found), (_, expected) = gradient_of(cut_model(options, model), family), gradient_of(model, family)
    for name, factors in found.modules.items():
        for leaf, whole in zip(
            (factors.a, factors.b), (expected.modules[name].a, expected.modules[name].b), strict=True
        ):
            assert not np.asarray(leaf[0]).any()
            assert_near(leaf[1:], whole[1:])


# ------------------------------------------------------------------------------------------- what crosses


def of(model, learns="label"):
    """A context of the model and a task."""
    task = PARTS["task"]._replace(learns=learns)
    return Context(num_clients=1, cohort_size=1, made={"model": model, "task": task})


def chain(num_layers, width=4):
    """A model of products alone: `x @ (w_l + a_l b_l)` in each layer, the head's product of the mean."""

    def run(base, adapters, hidden, key):
        f = adapters.modules["m"]
        values, _ = jax.lax.scan(lambda x, w: (x @ w, None), hidden.values, base["layers"] + f.a @ f.b)
        return hidden._replace(values=values)

    return Model(
        init=lambda key: {"layers": jax.random.normal(key, (num_layers, width, width))},
        init_head=lambda key: {},
        embed=lambda base, batch, key: Hidden(batch["x"], batch["mask"]),
        layers=run,
        task=lambda base, adapters, hidden, key: (
            jnp.mean(hidden.values * hidden.mask[..., None], 1) @ adapters.head["w"]
        ),
        sites={},
        num_layers=num_layers,
    )


def rounded(values):
    """NumPy: 255 levels by the largest, halves to even."""
    step = np.float32(np.abs(values).max()) / np.float32(127)
    return np.rint(values / step) * step


def test_int8_rounds_activations_and_gradients_at_both_cuts_as_numpy_does():
    """Oracle: forward and backward by hand; real positions alone cross."""
    model, random = chain(3), np.random.default_rng(3)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    x, mask = normal(2, 3, 4), np.float32([[1, 1, 1], [1, 1, 0]])
    w, a, b, head, target = normal(3, 4, 4), normal(3, 4, 2), normal(3, 2, 4), normal(4, 2), normal(2, 2)
    cut = cut_model(SplitOptions(device_layers=1, tail_layers=1, exchange="int8"), model)

    def loss(adapters):
        outputs = cut.apply({"layers": jnp.asarray(w)}, adapters, {"x": jnp.asarray(x), "mask": jnp.asarray(mask)})
        return jnp.sum(outputs * target)

    found = jax.jit(jax.grad(loss))(Adapters({"m": Factors(jnp.asarray(a), jnp.asarray(b))}, {"w": jnp.asarray(head)}))
    whole = w + a @ b
    first = x @ whole[0]
    second = rounded(first * mask[..., None])
    third = rounded(second @ whole[1] * mask[..., None])
    last = third @ whole[2]
    g_last = (target @ head.T)[:, None, :] * mask[..., None] / 3
    g_third = rounded(g_last @ whole[2].T * mask[..., None])
    g_second = g_third @ whole[1].T
    g_first = rounded(g_second * mask[..., None])
    by_layer = [np.einsum("bsi,bsj->ij", *pair) for pair in ((x, g_first), (second, g_third), (third, g_last))]
    np.testing.assert_allclose(found.head["w"], np.mean(last * mask[..., None], 1).T @ target, rtol=1e-5, atol=1e-6)
    for layer, g in enumerate(by_layer):
        np.testing.assert_allclose(found.modules["m"].a[layer], g @ b[layer].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.modules["m"].b[layer], a[layer].T @ g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "width", "batch", "megabits"), [(197, 768, 64, 309.9), (512, 768, 8, 100.66)])
def test_a_step_of_a_large_model_sends_as_many_bits_as_by_hand(tokens, width, batch, megabits):
    """ViT-B/16 and GPT-2 small, one way: values of a batch times 32."""
    pool = {"x": jnp.zeros((1, tokens, width)), "mask": jnp.ones((1, tokens))}
    rows, weight = jnp.zeros((1, batch), jnp.int32), jnp.ones((1, batch))
    up, down = jax.jit(lambda: split._crossing(SplitOptions(), of(chain(2)), {}, pool, rows, weight, ()))()
    assert up.exact() == 2 * batch * tokens * width * 32 and down.exact() * 2 == up.exact()
    assert abs(down.exact() / 1e6 - megabits) < 0.05


def test_padding_is_not_sent_and_labels_are_where_the_task_is_at_the_server():
    """By hand: two steps of two examples of 3 and 1 real positions, of which the last place has no weight."""
    pool = {"x": jnp.zeros((2, 3, 4)), "mask": jnp.array([[1.0, 1, 1], [1, 0, 0]])}
    rows, weight = jnp.array([[0, 1], [1, 0]]), jnp.array([[1.0, 1], [1, 0]])
    tokens, crossing = 3 + 1 + 1, {}
    for name, options in {
        "whole": SplitOptions(device_layers=1),
        "int8": SplitOptions(exchange="int8"),
        "server": SplitOptions(task="server", exchange="bfloat16"),
        "frozen": SplitOptions(device_layers=1, device_adapters="frozen", task="server"),
        "padded": SplitOptions(task="server", count_padding=True),
    }.items():
        found = split._crossing(options, of(chain(3)), {}, pool, rows, weight, ())
        crossing[name] = tuple(int(count.exact()) for count in found)
    assert crossing["whole"] == (2 * tokens * 4 * 32, 2 * tokens * 4 * 32)
    assert crossing["int8"] == (2 * (tokens * 4 * 8 + 2 * 32), tokens * 4 * 8 + 2 * 32)
    assert crossing["server"] == (tokens * 4 * 16 + 3 * 32, 0)
    assert crossing["frozen"] == (tokens * 4 * 32 + 3 * 32, 0)
    assert crossing["padded"] == (3 * 3 * 4 * 32 + 3 * 32, 0)


@pytest.mark.parametrize(
    ("learns", "labels"), [("label", 3), ("number", 3), ("token_label", 3 + 1 + 1), ("next_token", 3 + 1 + 1)]
)
def test_a_label_of_each_position_is_sent_for_real_positions_whatever_padding_is(learns, labels):
    """By hand, in the batches above; the task decides, not what else the pool holds."""
    pool = {"x": jnp.zeros((2, 3, 4)), "mask": jnp.array([[1.0, 1, 1], [1, 0, 0]]), "target": jnp.zeros((2, 3))}
    rows, weight = jnp.array([[0, 1], [1, 0]]), jnp.array([[1.0, 1], [1, 0]])
    for padding, values in ((False, 5), (True, 9)):
        options = SplitOptions(task="server", count_padding=padding)
        up, _ = split._crossing(options, of(chain(3), learns), {}, pool, rows, weight, ())
        assert up.exact() == values * 4 * 32 + labels * 32


def test_shares_of_the_work_are_those_of_the_layers():
    """By hand, of four layers; frozen first layers save `1 - l / (2 L)`."""
    for options, device, server in (
        (SplitOptions(), 0.0, 1.0),
        (SplitOptions(device_layers=1, tail_layers=1), 0.5, 0.5),
        (SplitOptions(device_layers=3, device_adapters="frozen"), 3 / 8, 1 / 4),
    ):
        np.testing.assert_allclose(split._shares(options, 4), (device, server))


def test_frozen_adapters_of_the_last_layers_stay():
    """By definition: of four layers the second and third move, the first and the last are at the device."""
    options, adapters = SplitOptions(device_layers=1, tail_layers=1, device_adapters="frozen"), adapters_of_four()
    found = split._moving(options, 4, adapters)
    for whole, own in zip(jax.tree.leaves(adapters.modules), jax.tree.leaves(found.modules), strict=True):
        np.testing.assert_array_equal(own[1:3], whole[1:3])
        assert not own[0].any() and not own[3].any()
    jax.tree.map(np.testing.assert_array_equal, found.head, adapters.head)


def adapters_of_four():
    return Adapters({"m": Factors(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 3)))}, {"w": jnp.ones(2)})


# --------------------------------------------------------------------------------------------- whole rounds

DENSE = ("sparsifier=dense", "control={name: ideal, keep_ratio: 1.0}")
SCHEDULED = (
    "training=split",
    "sparsifier=dense",
    "control={name: split_lyapunov, over_rounds: linear}",
    "wireless.server_hz=1e10",
    "clients.weighting=equal",
    "rounds=12",
    "engine.eval_every=12",
)


def test_three_rounds_are_those_of_ordinary_federated_lora():
    """Oracle: local training; the uplink is two crossings, two layers and the head, by hand."""
    whole, cut = (
        simulation(*DENSE, *more) for more in ((), ("training={name: split, device_layers: 1, tail_layers: 1}",))
    )
    (one, expected), (other, found) = (sim.run(sim.init(jax.random.key(3)), 3) for sim in (whole, cut))
    np.testing.assert_allclose(found.train_loss, expected.train_loss, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), one.adapters, other.adapters)
    layer, head = 3 * (64 + 64) + 3 * (64 + 256), 64 * 10 + 10
    a_step = 4 * 4 * 64 * 32
    assert found.client_uplink_bits[0].tolist() == [2 * 2 * a_step + 32 * (2 * layer + head)] * 6


def test_the_schedule_keeps_the_long_term_latency():
    """Law of the queue: the mean latency exceeds its budget by Q_T / T at most; and it leaves somebody out."""
    budget_s = 0.02
    sim = simulation(*SCHEDULED, "control.V=1e-3", f"control.latency_budget_s={budget_s}")
    _, metrics = sim.run(sim.init(jax.random.key(1)), 12)
    latency_s, queue_s = np.float64(metrics.latency_s), np.float64(metrics.queue_s)
    assert latency_s.mean() <= budget_s + queue_s[-1] / 12 + 1e-6
    assert metrics.participants[0] == 6 and metrics.participants.min() < 6
    assert (metrics.outages == 0).all()
    # By hand: rounds 1 ... 12 in proportion to their number, and the square of the devices that are absent.
    gamma = 2 * np.arange(1, 13) / 13
    np.testing.assert_allclose(metrics.methods["control/round_weight"], gamma, rtol=1e-6)
    np.testing.assert_allclose(metrics.absent_weight, 1 - metrics.participants / 6, rtol=1e-6, atol=1e-7)
    absence = gamma * (1 - metrics.participants / 6) ** 2
    np.testing.assert_allclose(metrics.methods["control/absence"], absence, rtol=1e-4, atol=1e-7)


def test_the_schedule_keeps_the_long_term_energy():
    """Law of the queue: what all devices spend a round exceeds its budget by Q_T / T at most; somebody is left out."""
    budget_j, own = 0.001, [f for f in SCHEDULED if not f.startswith("control")]
    energy = f"energy_budget_j: {budget_j}, latency_budget_s: null, V: 1e-6, over_rounds: linear"
    sim = simulation(*own, f"control={{name: split_lyapunov, {energy}}}")
    _, metrics = sim.run(sim.init(jax.random.key(1)), 12)
    energy_j, queue_j = np.float64(metrics.energy_j), np.float64(metrics.energy_queue_j)
    assert energy_j.mean() <= budget_j + queue_j[-1] / 12 + 1e-6
    assert metrics.participants[0] == 6 and metrics.participants.min() < 6
    # By hand: the queue of each round from the one before.
    before = np.concatenate([[0.0], queue_j[:-1]])
    np.testing.assert_allclose(queue_j, np.maximum(before + energy_j - budget_j, 0), rtol=1e-4, atol=1e-8)


def test_who_is_absent_sends_and_receives_nothing():
    """By hand: rows of the metrics beyond the cohort are 0, though some client's exchange stands there."""
    sim = simulation(*SCHEDULED, "control.V=0.0", "control.queue_s=1.0")
    _, metrics = sim.run(sim.init(jax.random.key(1)), 1)
    assert metrics.participants.tolist() == [0] and metrics.latency_s.tolist() == [0]
    assert metrics.uplink_bits.tolist() == [0] and metrics.downlink_bits.tolist() == [0]


@pytest.mark.filterwarnings("ignore:sparsifier. lora_a2 is")  # as its note has it
@pytest.mark.parametrize("training", ["{name: split}", "{name: split, task: server}"])
@pytest.mark.parametrize(
    "sparsifier",
    ["{name: soft, error_feedback: true}", "top_k", "svd", "soft_rotated", "lora_a2", "random_rank", "flasc"],
)
def test_every_sparsifier_sends_the_head_alone_where_no_layer_is_at_the_device(sparsifier, training, tmp_path):
    """By hand: the head's values, or nothing; all is finite, and a state is saved and restored."""
    own = (f"training={training}", f"sparsifier={sparsifier}", "control={name: ideal, keep_ratio: 0.5}")
    sim = simulation(*own, "rounds=1", "engine.eval_every=1", "clients.weighting=equal")
    state, metrics = sim.run(sim.init(jax.random.key(2)), 1)
    assert np.isfinite([metrics.train_loss, metrics.kept_ranks_mean, metrics.dropped_energy]).all()
    crossing, labels = 2 * 4 * 4 * 64 * 32, 2 * 4 * 32
    head = 32 * (64 * 10 + 10)
    expected = crossing + labels if "server" in training else 2 * crossing + head
    assert set(metrics.client_uplink_bits[0].tolist()) <= {expected, expected + 32}  # a seed
    folder = RunFolder.create(tmp_path / "run", dump(config(*own)), {})
    folder.append(metrics)
    folder.save(state)
    last = folder.last_checkpoint()
    restored = checkpoint.restore(last, sim.init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, restored.adapters, state.adapters)


@pytest.mark.parametrize(("precision", "expected"), [("bfloat16", None), ("int8", 0.0)])
def test_roundings_are_those_of_their_type(precision, expected):
    """Oracle: `ml_dtypes`; and tensors so small that a step would not be a number of float32 cross as zeros."""
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: split.rounded(x, precision))(values))
    if precision == "bfloat16":
        np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16).astype(np.float32))
    tiny = np.asarray(jax.jit(lambda x: split.rounded(x, precision))(values * np.float32(1e-37)))
    assert np.isfinite(tiny).all() and (expected is None or (tiny == expected).all())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("training={name: split, device_layers: 3, tail_layers: 1}", "must be below 4, the model's layers, got 3 + 1"),
        ("training={name: split, tail_layers: 1, task: server}", "tail_layers must be 0 where task is server, got 1"),
        ("training={name: split, device_layers: -1}", "device_layers must be at least 0, got -1"),
        ("training={name: split, exchange: int4}", "exchange"),
        ("control={name: split_lyapunov, growth: 3}", "growth must be between 0.5 and 2, got 3"),
        (
            "control={name: split_lyapunov, energy_budget_j: 1}",
            "latency_budget_s must be null just where energy_budget_j is given, got 2.0 and 1.0",
        ),
    ],
)
def test_a_wrong_cut_is_one_line(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        simulation(overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_knows_no_exchange_refuses_split_training():
    """One line that names who needs what."""
    own = config("training=split", "sparsifier=dense")
    with pytest.raises(ConfigError, match=r"training.name must be local, for a network without training, got 'split'"):
        sweep_network(own, {"seed": [0]}, rounds=1)
    chosen = config("control={name: best_channel}", "clients.per_round=3")
    with pytest.raises(ConfigError, match=r"a controller that does not choose the cohort, .*, got 'best_channel'"):
        sweep_network(chosen, {"seed": [0]}, rounds=1)
    with pytest.raises(ConfigError, match=r"training.name must be local, for a plan, got 'split'"):
        check_needs(own, Catalogue.of(), NEEDS, "a plan")


@pytest.mark.parametrize("method", ["aggregation=flora", "aggregation=fedsa", "aggregation=lora_fair"])
def test_what_needs_all_adapters_at_the_client_is_refused(method):
    with pytest.raises(ConfigError, match=r"training.name must be local where .* needs clients that hold all adapters"):
        config("training=split", "sparsifier=dense", method)
