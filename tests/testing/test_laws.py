"""The laws that `fedjax_lora.testing` holds methods to: the package's own keep them, wrong ones are named."""

import dataclasses
import json
from typing import Literal

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fedjax_lora.adapters import lora
from fedjax_lora.aggregation import fedit
from fedjax_lora.config.catalogue import METHODS, SLOTS
from fedjax_lora.control import arrival, fixed, uniform
from fedjax_lora.core.count import Count
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Factors
from fedjax_lora.data import options, sources
from fedjax_lora.models import bert, llama, load
from fedjax_lora.sparsifiers import dense, soft, top_k
from fedjax_lora.tasks import causal_lm, classification
from fedjax_lora.testing import examples, laws, slots
from fedjax_lora.training import corrections, local, optimizers
from fedjax_lora.wireless import cell

MORE = {
    "tsfa": [{}, {"energy_budget_j": 0.1}],
    "soft": [{}, {"error_feedback": True}, {"send": "factors", "missing": "zero", "budget": "global"}],
    "fedex": [{}, {"start": "reinit"}, {"start": "keep"}],
    "buffered": [{"buffer": 2}, {"buffer": 4, "staleness": "constant"}],
    "cell": [{"csi": "estimated", "retransmissions": 1, "fading": "rician", "downlink": True}],
}
"""Method -> options that are other code than its defaults."""


@pytest.fixture
def data(tmp_path):
    """Writes two examples as a source reads them, and gives the options that name them."""

    def write(source):
        path = tmp_path / source
        given = {"source": source, "train": str(path), "test": str(path)}
        rows = [{"text": "good film", "label": "yes"}, {"text": "bad film", "label": "no"}]
        if source == "tsv":
            path.write_text("".join("\t".join(row.values()) + "\n" for row in rows))
            return sources.DataConfig(max_length=8, **given)
        if source == "images":
            for row in rows:
                (path / row["label"]).mkdir(parents=True)
                Image.new("L", (3, 5), len(row["label"])).save(path / row["label"] / "one.png")
            return options.ImagesConfig(image_size=4, **given)
        if source == "datasets":
            split = datasets.Dataset.from_list(rows)
            datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(path))
            return options.HubConfig(dataset=str(path), max_length=8)
        if source == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif source == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("".join(",".join(row) + "\n" for row in (rows[0], *(row.values() for row in rows))))
        return options.FilesConfig(max_length=8, **given)

    return write


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.slot}-{method.name}")
def test_every_method_of_the_catalogue_keeps_the_laws(method, data):
    """The oracle is each law; a method that is new in the catalogue is tried here too."""
    if method.slot == "data" and method.name != "digits":
        laws.check(method, data(method.name))
        return
    for more in MORE.get(method.name, [{}]):
        laws.check(method, method.options(**more))


def test_every_slot_has_laws():
    assert set(slots.LAWS) == set(SLOTS) and set(slots.EXERCISES) == set(SLOTS) - {"data"}
    assert examples.DIMENSIONS["KCLR"] == (6, 4, 2, 4)


# ------------------------------------------------------------------------------------------- methods that are wrong


def changed(method, change):
    """The method with its record changed by `(record, options) -> record`."""

    def make(options, context):
        return change(method.make(options, context), options)

    return method._replace(make=make)


def turned_the_wrong_way(record, options):
    """Components are sent in another basis, and turned back by the same matrix in place of its transpose."""
    q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((examples.RANK,) * 2))[0], jnp.float32)
    turn = jnp.eye(examples.MAX_RANK).at[: examples.RANK, : examples.RANK].set(q)  # square: shapes say nothing

    def decode(start, message, scope):
        found = record.decode(start, message, scope)
        both = scope.a * scope.b > 0
        modules = {
            name: Factors(a=jnp.where(both, f.a @ turn, f.a), b=jnp.where(both, turn @ f.b, f.b))
            for name, f in found.adapters.modules.items()
        }
        return dataclasses.replace(found, adapters=Adapters(modules=modules, head=found.adapters.head))

    return record._replace(decode=decode)


def without_an_index(record, options):
    def encode(*given):
        return record.encode(*given)._replace(index_bits=Count.of(0))

    return record._replace(encode=encode)


def loses_memory(record, options):
    def remember(*given):
        return jax.tree.map(lambda leaf: 0.9 * leaf, record.remember(*given))

    return record._replace(remember=remember)


def sends_nothing(record, options):
    def encode(start, trained, memory, kept, scope, key):
        nothing = dataclasses.replace(scope, a=jnp.zeros(()), b=jnp.zeros(()), head=jnp.zeros(()))
        return record.encode(start, trained, memory, kept, nothing, key)

    return record._replace(encode=encode)


def forgets_what_it_costs(record, options):
    def offer(*given):
        found = record.offer(*given)
        return found._replace(size=found.size._replace(values=Count.of(jnp.full(examples.MAX_RANK + 1, 3))))

    return record._replace(offer=offer)


def weighs_too_much(record, options):
    def aggregate(broadcast, trained, received, weights, scale, key):
        return record.aggregate(broadcast, trained, received, 1.5 * weights, scale, key)

    return record._replace(aggregate=aggregate)


def steps_too_far(record, options):
    def aggregate(broadcast, *given):
        found = record.aggregate(broadcast, *given)
        modules = jax.tree.map(lambda new, old: old + 1.1 * (new - old), found.adapters.modules, broadcast.modules)
        return found._replace(adapters=Adapters(modules=modules, head=found.adapters.head))

    return record._replace(aggregate=aggregate)


def enters_too_much(record, options):
    def enter(*given):
        factors, weights = record.enter(*given)
        return factors, 1.5 * weights

    return record._replace(enter=enter)


def looks_at_the_absent(record, options):
    def aggregate(broadcast, trained, received, weights, scale, key):
        found = record.aggregate(broadcast, trained, received, weights, scale, key)
        head = jax.tree.map(lambda heads: jnp.einsum("c,c...->...", weights, heads), received.adapters.head)
        return found._replace(adapters=dataclasses.replace(found.adapters, head=head))

    return record._replace(aggregate=aggregate)


def gives_too_much_band(record, options):
    def allocate(*given):
        found = record.allocate(*given)
        return found._replace(share_hz=1.01 * found.share_hz)

    return record._replace(allocate=allocate)


def favours_the_first(record, options):
    def allocate(*given):
        found = record.allocate(*given)
        return found._replace(kept=found.kept.at[0].multiply(0.5))

    return record._replace(allocate=allocate)


def drawn_by_place(record, options):
    def init(key, client_ids):
        return record.init(key, jnp.arange(client_ids.shape[0]))

    return record._replace(init=init)


def pays_for_the_absent(record, options):
    def deliver(*given):
        found = record.deliver(*given)
        return found._replace(energy_j=found.energy_j + 1e-3)

    return record._replace(deliver=deliver)


def moves_from_rest(record, options):
    def update(gradient, state, params):
        updates, state = record.update(gradient, state, params)
        return jax.tree.map(lambda u: u - 1e-3, updates), state

    return record._replace(update=update)


def pulls_everywhere(record, options):
    return record._replace(gradient=lambda g, *given: jax.tree.map(lambda leaf: leaf + 1e-3, g))


def in_half_precision(record, options):
    return record._replace(gradient=lambda g, *given: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), g))


def counts_padding(record, options):
    return record._replace(loss=lambda outputs, batch, weight: jnp.mean(record.score(outputs, batch)["loss"]))


def counts_all_scores(record, options):
    return record._replace(finish=lambda scores, weight: record.finish(scores, jnp.ones_like(weight)))


def credits_the_next(record, options):
    def score(outputs, batch):
        ids = {"example_ids": batch["example_ids"] + 1} if "example_ids" in batch else {}
        return record.score(outputs, {**batch, **ids})

    return record._replace(score=score)


def starts_with_noise(record, options):
    def init(*given):
        return {name: dataclasses.replace(f, b=f.b + 0.1) for name, f in record.init(*given).items()}

    return record._replace(init=init)


def merges_without_scale(record, options):
    return record._replace(merge=lambda modules: jax.tree.map(lambda x: 0.5 * x, record.merge(modules)))


def normalises_over_the_batch(record, options):
    def task(base, adapters, hidden, key):
        outputs = record.task(base, adapters, hidden, key)
        return outputs - jnp.mean(outputs, 0)

    return record._replace(task=task)


def puts_sites_elsewhere(record, options):
    sites = {name: site._replace(first=0) for name, site in record.sites.items()}
    return record._replace(sites=sites)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Options):
    """A small encoder of text."""

    name: Literal["encoder"] = "encoder"


def encoder(options: EncoderConfig, context: Context):
    shape = bert.BertConfig(vocab_size=10, width=12, num_layers=2, num_heads=3, mlp_width=20, max_positions=8)
    return bert.bert(shape, context.made["task"], context.made["adapter"])


ENCODER = Method("model", "encoder", EncoderConfig, encoder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Options):
    """A small decoder of text, whose heads share keys and are wider together than the model."""

    name: Literal["decoder"] = "decoder"


def decoder(options: DecoderConfig, context: Context):
    shape = llama.LlamaConfig(
        vocab_size=10, width=10, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, mlp_width=14, max_positions=8,
        head_norms=True, pooling="last", dropout=0.3,
    )  # fmt: skip
    return llama.decoder(shape, context.made["task"], context.made["adapter"])


DECODER = Method("model", "decoder", DecoderConfig, decoder)


def test_a_decoder_keeps_the_laws_of_models(monkeypatch):
    """The general ones are tried on the encoder."""
    monkeypatch.setattr(laws, "general", lambda exercise, subject: {})
    laws.check(DECODER)


def test_an_encoder_of_text_keeps_the_laws():
    laws.check(ENCODER)


def looks_along_its_row(record, options):
    def layers(base, adapters, hidden, key):
        places = hidden.places and hidden.places._replace(example=0 * hidden.places.example)
        return record.layers(base, adapters, hidden._replace(places=places), key)._replace(places=hidden.places)

    return record._replace(layers=layers)


def trains_what_is_at_rest(record, options):
    def train(given, client):
        return record.train(given._replace(live=given.live._replace(a=jnp.ones(()))), client)

    return record._replace(train=train)


def names_the_wrong_shape(record, options):
    return record._replace(load=lambda *given: record.load(*given)._replace(image_shape=(8, 8, 3)))


SOFT_WITH_MEMORY = soft.SoftConfig(error_feedback=True)


# The oracle of each row is by hand: the one law that it breaks first.
def counts_late_ones_more(record, options):
    return record._replace(discount=lambda staleness: 1.0 + staleness)


def takes_more_than_run(record, options):
    return record._replace(takes=examples.COHORT_SIZE + 1)


WRONG = [
    (turned_the_wrong_way, dense.METHOD, "what is kept whole arrives whole"),
    (sends_nothing, dense.METHOD, "what is kept whole arrives whole"),
    (without_an_index, top_k.METHOD, "bits count the choice"),
    (forgets_what_it_costs, dense.METHOD, "the offer covers the message"),
    (loses_memory, soft.METHOD, "memory and message hold all of an update"),
    (weighs_too_much, fedit.METHOD, "equal clients average to themselves"),
    (steps_too_far, fedit.METHOD, "equal clients average to themselves"),
    (enters_too_much, fedit.METHOD, "weights of the mean product sum to one"),
    (looks_at_the_absent, fedit.METHOD, "who is absent changes nothing"),
    (gives_too_much_band, fixed.METHOD, "shares are of the band"),
    (favours_the_first, uniform.METHOD, "no order of the cohort is special"),
    (counts_late_ones_more, arrival.METHODS[0], "who is on time counts in full"),
    (takes_more_than_run, arrival.METHODS[0], "a step takes clients that run"),
    (drawn_by_place, cell.METHOD, "a client is known by its name"),
    (pays_for_the_absent, cell.METHOD, "who is absent costs nothing"),
    (moves_from_rest, optimizers.METHODS[0], "a server that is told nothing stays"),
    (pulls_everywhere, corrections.METHODS[0], "without gradients nothing moves"),
    (in_half_precision, corrections.METHODS[0], "states and gradients keep their form"),
    (counts_padding, classification.METHOD, "examples of weight 0 do not count"),
    (counts_all_scores, classification.METHOD, "scores of weight 0 are passed over"),
    (credits_the_next, causal_lm.METHOD, "a packed batch is learned alike"),
    (starts_with_noise, lora.METHOD, "adapters at the start add nothing"),
    (merges_without_scale, lora.METHOD, "merged weights compute the same"),
    (normalises_over_the_batch, load.METHOD, "outputs are one for each example"),
    (puts_sites_elsewhere, load.METHOD, "merged weights give the same outputs"),
    (looks_along_its_row, ENCODER, "packed batches give the same outputs"),
    (trains_what_is_at_rest, local.METHOD, "what is not trained stays"),
    (names_the_wrong_shape, sources.METHODS[0], "images say their shape"),
]


@pytest.mark.parametrize(("change", "method", "law"), WRONG, ids=[row[0].__name__ for row in WRONG])
def test_a_wrong_method_is_caught_by_the_name_of_the_law(change, method, law, monkeypatch):
    """The laws of its slot alone: the general ones take most of the time, and have wrong methods of their own below."""
    monkeypatch.setattr(laws, "general", lambda exercise, subject: {})
    options = SOFT_WITH_MEMORY if method is soft.METHOD else None
    with pytest.raises(AssertionError) as caught:
        laws.check(changed(method, change), options)
    message = str(caught.value)
    assert message.startswith(f"{method.slot} {method.name} breaks the law {law!r}: ") and "\n" not in message


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig(Options):
    """A server's step by a rate that is traced."""

    name: Literal["step"] = "step"
    rate: float = traced(1.0)
    other: float = traced(0.0)


def branches(options: StepConfig, context: Context):
    record = optimizers.METHODS[0].make(optimizers.FedAvgConfig(), context)
    return record if options.rate == 1.0 else record._replace(init=lambda params: 0)


def goes_by_the_host(options: StepConfig, context: Context):
    record = optimizers.METHODS[0].make(optimizers.FedAvgConfig(), context)
    rate = np.sqrt(options.rate)
    return record._replace(update=lambda g, state, params: (jax.tree.map(lambda x: -rate * x, g), state))


def is_not_finite(options: StepConfig, context: Context):
    record = optimizers.METHODS[0].make(optimizers.FedAvgConfig(), context)
    return record._replace(
        update=lambda g, state, params: (jax.tree.map(lambda x: x * options.rate / jnp.zeros(()), g), state)
    )


DRAWN = iter(np.linspace(1.0, 2.0, 50))  # another number each time that a program is made


def depends_on_the_batch(options: StepConfig, context: Context):
    record = optimizers.METHODS[0].make(optimizers.FedAvgConfig(), context)

    def update(gradient, state, params):
        by = options.rate * next(DRAWN)
        return jax.tree.map(lambda x: -by * x, gradient), state

    return record._replace(update=update)


@pytest.mark.parametrize(
    ("make", "law", "more"),
    [
        (branches, "numbers are traced", "rate must be used as an array"),
        (goes_by_the_host, "numbers are traced", "rate must be used as an array"),
        (depends_on_the_batch, "a batch of settings equals single runs", ""),
        (is_not_finite, "results are finite", ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_use_of_numbers_is_caught_by_the_name_of_the_law(make, law, more):
    with pytest.raises(AssertionError) as caught:
        laws.check(Method("server", "step", StepConfig, make))
    assert str(caught.value).startswith(f"server step breaks the law {law!r}: {more}")


def test_what_has_no_laws_is_refused():
    with pytest.raises(ValueError, match=r"slot must be one of data, task, .* got 'sparsifer'"):
        laws.check(dense.METHOD._replace(slot="sparsifer"))


def test_trees_are_compared_as_they_are():
    """By hand: complex numbers by both of their parts, integers exactly."""
    laws.close({"h": jnp.complex64(1 + 2j), "n": jnp.int32(3)}, {"h": jnp.complex64(1 + 2j), "n": jnp.int32(3)})
    for wrong in ({"h": jnp.complex64(1 - 2j)}, {"h": jnp.complex64(1 + 2.1j)}):
        with pytest.raises(AssertionError):
            laws.close(wrong, {"h": jnp.complex64(1 + 2j)})
