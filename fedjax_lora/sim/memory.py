"""What a run will hold in memory, by its shapes alone."""

from typing import NamedTuple

from fedjax_lora.adapters.lora import max_rank
from fedjax_lora.core import trees
from fedjax_lora.core.memory import Term, total
from fedjax_lora.core.types import FedState
from fedjax_lora.sim.feed import Feed
from fedjax_lora.sim.options import EngineConfig
from fedjax_lora.sim.parts import Layout, World
from fedjax_lora.sim.placement import base_bytes
from fedjax_lora.training.local import LocalConfig

ADAPTERS_IN_TRAINING = 4
"""Copies beside them of a client in training: the adapters, their gradient, two moments."""


class Needs(NamedTuple):
    """What decides about the memory of a run, beside its layout.

    world, state: of the run; of the latter, and of the frozen base, only shapes are used.
    activation_bytes: what the backward pass of one client keeps, see `sim.chunk`.
    num_layers: L of the model, which work one after the other.
    local, engine: as they were asked for; a batch takes no more than what fills it.
    feed: what brings the training pool from the host; None where it is on the device.
    """

    world: World
    state: FedState
    activation_bytes: int
    num_layers: int
    local: LocalConfig
    engine: EngineConfig
    feed: Feed | None = None


def run_terms(needs: Needs, layout: Layout, trials: int = 1) -> list[Term]:
    """What each device holds at the peak of a run: in training or in evaluation, whichever takes more.

    A low estimate: what XLA adds to it is not known before it has compiled. Of so many trials at once on each device,
    only the frozen base and the data are shared.
    """
    world, state, activation_bytes, num_layers, local, engine, feed = needs
    base, adapters = base_bytes(world.base, layout), trees.num_bytes(state.adapters)
    clients = trees.num_bytes((state.clients, state.methods["wireless"]))
    running = trees.num_bytes(state.methods["arrival"])
    num_clients, num_tests = world.data.count.shape[0], world.data.test["label"].shape[0]
    cohort = layout.padded_cohort if layout.in_order else layout.padded_cohort // layout.num_devices
    # The backward pass works on one layer beside what is kept of all; a forward pass holds half of a layer at a time.
    training = activation_bytes * (1 + 1 / num_layers) + ADAPTERS_IN_TRAINING * adapters
    example = activation_bytes / min(local.batch_size, int(world.data.count.max())) / num_layers / 2
    tested = min(engine.eval_batch_size, -(-num_tests // layout.num_devices))

    more = f"take a smaller model.pretrained, or raise engine.model_devices, got {layout.model_devices}"
    several = f"lower engine.client_chunk, got {engine.client_chunk}"
    copies = 2 if layout.all_at_once else 1  # as trained and, where all are averaged at once, as received
    in_training = [
        Term(
            cohort * (copies * adapters + clients / num_clients),
            f"lower {layout.cohort_key}, got {layout.cohort_size}",
            "adapters of the cohort",
        ),
        Term(
            layout.chunk * training,
            several if layout.chunk > 1 else f"lower local.batch_size, got {local.batch_size}",
            "clients in training",
        ),
    ]
    in_evaluation = [
        Term(tested * example, f"lower engine.eval_batch_size, got {engine.eval_batch_size}", "evaluation")
    ]
    split = layout.num_devices if not layout.in_order and num_clients % layout.num_devices == 0 else 1
    data = trees.num_bytes(world.data)
    if feed is not None:  # what the next segment needs comes while one runs
        data += trees.num_bytes((world.data.train, world.data.index.ids, world.data.index.rows))
    shared = [
        Term(base * (2 if state.merged else 1), more, "frozen base"),
        Term(data, _less_data(feed), "data"),
    ]
    of_a_trial = [
        # A run begins with a copy of its state.
        Term(2 * clients / split, f"lower clients.count, got {num_clients}", "state of the clients"),
        Term(
            2 * (trees.num_bytes(state) - clients - running),
            f"lower lora.max_rank, got {max_rank(state.adapters)}",
            "adapters",
        ),
        # The bits of each client, up and down, of all rounds between two evaluations.
        Term(
            engine.eval_every * 16 * layout.cohort_size, f"lower engine.eval_every, got {engine.eval_every}", "metrics"
        ),
        *max(in_training, in_evaluation, key=total),
    ]
    if layout.running is not None:
        less = f"lower clients.per_round, got {layout.running}"
        of_a_trial.append(Term(2 * running, less, "models of running clients"))
    return [*shared, *(term._replace(bytes=trials * term.bytes) for term in of_a_trial)]


def _less_data(feed: Feed | None) -> str:
    if feed is None:
        return "set engine.data to host, lower data.max_length, or take less data"
    return f"lower engine.eval_every, got {feed.rounds}, or data.max_length"
