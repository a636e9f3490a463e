"""Optimizers and learning-rate schedules by name: optax's, with every number traced.

The clients' optimizer gives a direction, and the rate stands apart; a server optimizer makes the whole step.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from fedjax_lora.core.learning import Optimizer
from fedjax_lora.core.methods import Context, Method
from fedjax_lora.core.numbers import Options, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The clients' optimizer. Its state starts afresh each round.

    name: which optimizer it is.
    learning_rate: peak rate.
    schedule: decay to 0 over all local steps of all rounds, after `warmup_steps`.
    warmup_steps: local steps of linear rise, counted over all rounds.
    momentum: of `momentum`, where None stands for 0.9. weight_decay: of `adamw`.
    clip_norm: global gradient norm; None leaves it free.
    """

    name: Literal["sgd", "momentum", "adamw"] = "adamw"
    learning_rate: float = traced(1e-3)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = traced(0)
    momentum: float | None = traced(None)
    weight_decay: float = traced(0.0)
    clip_norm: float | None = traced(None)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.momentum is not None and self.name != "momentum":
            raise ValueError(f"momentum must be null where name is {self.name}, got {self.momentum}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1) or null, got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.weight_decay > 0 and self.name != "adamw":
            raise ValueError(f"weight_decay must be 0 where name is {self.name}, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0 or null, got {self.clip_norm}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ServerOptions(Options):
    """What the server's optimizers on the pseudo-gradient `broadcast - average` have in common.

    learning_rate: of the server.
    """

    learning_rate: float = traced(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAvgConfig(_ServerOptions):
    """Plain steps; a learning rate of 1.0 is plain averaging."""

    name: Literal["sgd"] = "sgd"

    def breaks(self) -> dict[str, str]:
        return {} if self.learning_rate == 1.0 else {"whole_step": "learning_rate"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAvgMConfig(_ServerOptions):
    """Momentum: T.-M. H. Hsu et al., arXiv 1909.06335.

    momentum: share of the last step that is taken again.
    """

    name: Literal["momentum"] = "momentum"
    momentum: float = traced(0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AdaptiveOptions(_ServerOptions):
    """Decays of both moments, and what is added to the root of the second.

    At first a step moves every entry by about the learning rate, whatever the pseudo-gradient is: 1.0 is far too much.

    beta1: decay of the first moment. beta2: decay of the second moment.
    epsilon: what is added to the root of the second moment.
    """

    learning_rate: float = traced(0.01)
    beta1: float = traced(0.9)
    beta2: float = traced(0.99)
    epsilon: float = traced(1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAdamConfig(_AdaptiveOptions):
    """Adam: S. Reddi et al., "Adaptive Federated Optimization", ICLR 2021, with optax's correction of the bias."""

    name: Literal["adam"] = "adam"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedYogiConfig(_AdaptiveOptions):
    """Yogi: S. Reddi et al. as for `adam`, with optax's start of the second moment."""

    name: Literal["yogi"] = "yogi"


def direction(config: OptimizerConfig) -> Optimizer:
    """The descent direction before it is multiplied by the learning rate."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    step = {
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(0.9 if config.momentum is None else config.momentum),
        "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay)),
    }[config.name]()
    return Optimizer(*optax.chain(clip, step))


def schedule(config: OptimizerConfig, total_steps: int, step: ArrayLike) -> Array:
    """`[...]` factor in [0, 1] on the peak learning rate at local steps `[...]`, counted over all rounds.

    Linear rise over `warmup_steps`, then the decay over what is left. Ours: optax's schedules take no traced lengths.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.asarray(config.warmup_steps, jnp.float32)
    done = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1.0), 0.0, 1.0)
    decay = {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    }[config.schedule]
    return jnp.where(step < warmup, (step + 1.0) / jnp.maximum(warmup, 1.0), decay)


def depends_on_rounds(config: OptimizerConfig) -> bool:
    """Whether the rates of the first rounds are others where more rounds follow."""
    return config.schedule != "constant"


def fed_avg(config: FedAvgConfig, context: Context) -> Optimizer:
    """The server's whole step, learning rate included, as of all that follow."""
    return Optimizer(*optax.sgd(config.learning_rate))


def fed_avg_m(config: FedAvgMConfig, context: Context) -> Optimizer:
    """Steps along a decaying sum of the pseudo-gradients."""
    return Optimizer(*optax.sgd(config.learning_rate, config.momentum))


def fed_adam(config: FedAdamConfig, context: Context) -> Optimizer:
    """Steps by the ratio of the moments."""
    return Optimizer(*optax.adam(config.learning_rate, config.beta1, config.beta2, config.epsilon))


def fed_yogi(config: FedYogiConfig, context: Context) -> Optimizer:
    """As `fed_adam`, with Yogi's second moment.

    The first starts at 0 as in Reddi et al., where optax has it start where the second does.
    """
    made = optax.yogi(config.learning_rate, config.beta1, config.beta2, config.epsilon)

    def init(params: Any) -> Any:
        state: Any = made.init(params)
        first, *rest = state
        return (first._replace(mu=jax.tree.map(jnp.zeros_like, params)), *rest)

    return Optimizer(init, made.update)


_REMEMBERS = frozenset({"memoryless_server", "whole_step"})

METHODS = (
    Method("server", "sgd", FedAvgConfig, fed_avg),
    Method("server", "momentum", FedAvgMConfig, fed_avg_m, breaks=_REMEMBERS),
    Method("server", "adam", FedAdamConfig, fed_adam, breaks=_REMEMBERS),
    Method("server", "yogi", FedYogiConfig, fed_yogi, breaks=_REMEMBERS),
)
