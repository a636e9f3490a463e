"""Corrections of the clients' drift apart: none, FedProx, SCAFFOLD.

FedProx: T. Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020. SCAFFOLD: S. P. Karimireddy
et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, with its second option for
the control variates.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedjax_lora.core.learning import Correction
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced
from fedjax_lora.core.types import Adapters, Scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoDriftConfig(Options):
    """Gradients as they are."""

    name: Literal["none"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedProxConfig(Options):
    """A pull back to the broadcast: `mu / 2 * ||adapters - broadcast||^2` is added to the local loss.

    mu: weight of the pull.
    """

    name: Literal["fedprox"] = "fedprox"
    mu: float = traced(0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be finite and at least 0, got {self.mu}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaffoldConfig(Options):
    """Control variates: each client carries one, and sends its change beside its update; goes with SGD alone."""

    name: Literal["scaffold"] = "scaffold"


def no_correction(config: NoDriftConfig, context: Context) -> Correction:
    """No correction, no state."""
    return Correction(
        init_client=lambda adapters: (),
        init_server=lambda adapters: (),
        gradient=lambda gradient, adapters, start, server, client: gradient,
        next_client=lambda start, trained, path, scope, server, client: client,
        next_server=lambda server, change: server,
    )


def fedprox(config: FedProxConfig, context: Context) -> Correction:
    """The gradient of the proximal term is added; there is no state."""

    def gradient(gradient: Adapters, adapters: Adapters, start: Adapters, server: Any, client: Any) -> Adapters:
        del server, client
        return jax.tree.map(lambda g, x, x0: g + config.mu * (x - x0), gradient, adapters, start)

    return no_correction(NoDriftConfig(), context)._replace(gradient=gradient)


def scaffold(config: ScaffoldConfig, context: Context) -> Correction:
    """The gradient is corrected by `c - c_k`; after training `c_k` becomes `c_k - c + (start - trained) / path`.

    A control variate of what was not trained in a round stays as it is.
    """

    def zeros(adapters: Adapters) -> Adapters:
        return jax.tree.map(jnp.zeros_like, adapters)

    def gradient(
        gradient: Adapters, adapters: Adapters, start: Adapters, server: Adapters, client: Adapters
    ) -> Adapters:
        del adapters, start
        return jax.tree.map(lambda g, c, own: g + c - own, gradient, server, client)

    def next_client(
        start: Adapters, trained: Adapters, path: Array, scope: Scope, server: Adapters, client: Adapters
    ) -> Adapters:
        rate = 1 / jnp.maximum(path, jnp.finfo(jnp.float32).tiny)
        moved = jax.tree.map(lambda x0, x, c, own: own - c + (x0 - x) * rate, start, trained, server, client)
        return scope.select(moved, client)

    return Correction(
        init_client=zeros,
        init_server=zeros,
        gradient=gradient,
        next_client=next_client,
        next_server=lambda server, change: jax.tree.map(jnp.add, server, change),
    )


METHODS = (
    Method("drift", "none", NoDriftConfig, no_correction),
    Method("drift", "fedprox", FedProxConfig, fedprox),
    Method(
        "drift",
        "scaffold",
        ScaffoldConfig,
        scaffold,
        needs=frozenset({"one_rank", "plain_sgd", "unclipped", "shared_b", "fixed_basis", "trained_apart", "in_step"}),
    ),
)
