"""What methods need of an experiment and what breaks it: which of them go together.

A method that needs a property of the experiment is refused where another method, or a value of another section, breaks
it. So no method knows of another.
"""

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedjax_lora.config import values
from fedjax_lora.config.values import key_of
from fedjax_lora.core.errors import ConfigError
from fedjax_lora.core.methods import Method
from fedjax_lora.core.numbers import Options

if TYPE_CHECKING:
    from fedjax_lora.config.catalogue import Catalogue

PROPERTIES = {
    "text_model": "a model of text",
    "image_model": "a model of images",
    "one_rank": "one rank for all clients in all rounds",
    "even_ranks": "one rank for all layers",
    "shared_b": "a factor b that all clients share",
    "unchanged_where_unsent": "what is not sent to enter the average as no change",
    "dense_broadcast": "clients that start from the server's whole factors",
    "whole_tail": "tail energies of all that a client may send",
    "plain_sgd": "clients that train by plain SGD",
    "unclipped": "gradients that are not clipped",
    "memoryless_server": "a server that keeps no moments",
    "whole_step": "a server that steps all the way to the average",
    "float32_base": "frozen weights in float32",
    "fixed_basis": "components that keep their basis from round to round",
    "everything_sent": "all components to be sent",
    "exact_wire": "values that arrive as they were sent",
    "start_from_broadcast": "clients that start from the broadcast",
    "latency_alone": "a budget of latency alone",
    "single_attempt": "one attempt for each upload",
    "full_participation": "all clients in every round",
    "lasting_zeros": "components that stay zero once they are",
    "factors_together": "both factors trained in every round",
    "whole_at_client": "clients that hold all adapters",
    "trained_apart": "clients that train apart from one another",
    "side_by_side": "clients that send side by side",
    "no_dropout": "no dropout",
    "zero_start": "adapters that add nothing at the start",
    "free_broadcast": "a broadcast that takes no time",
    "listed_examples": "a list of who holds which examples",
    "in_step": "clients that begin and end each round together",
    "whole_pool": "all examples on the device",
}
"""What a method may need of the rest of an experiment, or break: property -> what is needed, in words."""


class _Fact(NamedTuple):
    """A value of a section without methods that breaks a property.

    key: dotted. broken: `(value, configuration) -> bool`. allowed: what the key must be instead.
    """

    key: str
    property: str
    broken: Callable[[Any, Any], bool]
    allowed: str


_FACTS = (
    _Fact("model.pretrained", "text_model", lambda value, _: value is None, "a folder or a Hugging Face model id"),
    _Fact("model.compute_dtype", "float32_base", lambda value, _: value != "float32", "float32"),
    _Fact("model.dropout", "no_dropout", lambda value, _: value > 0, "0"),
    _Fact("lora.client_ranks", "one_rank", lambda value, _: bool(value), "absent"),
    _Fact("lora.rank_pattern", "even_ranks", lambda value, _: bool(value), "absent"),
    _Fact("lora.initial", "zero_start", lambda value, _: value is not None, "absent"),
    _Fact("local.optimizer.name", "plain_sgd", lambda value, _: value != "sgd", "sgd"),
    _Fact("local.optimizer.clip_norm", "unclipped", lambda value, _: value is not None, "absent"),
    _Fact(
        "clients.partition.kind",
        "listed_examples",
        lambda value, _: value == "sampled",
        "iid, dirichlet, shards, natural or flwr",
    ),
    _Fact("engine.data", "whole_pool", lambda value, _: value == "host", "device"),
    _Fact("wire.bits", "exact_wire", lambda value, _: value < 32, "32"),
    _Fact(
        "clients.per_round",
        "full_participation",
        lambda value, config: value is not None and value < config.clients.count,
        "absent",
    ),
)


class _Claim(NamedTuple):
    """That the value of a key needs a property, or breaks it.

    allowed: what else the key may be; None where it is to be found out.
    """

    key: str
    value: Any
    allowed: str | None = None


def check(config: Any, catalogue: "Catalogue") -> None:
    """Refuse an experiment in which a method needs what another breaks.

    Raises:
      ConfigError: names the key that breaks it, what is allowed, where what needs it, and what it got.
    """
    chosen = catalogue.chosen(config)
    broken, needed = _broken(config, chosen), _needed(config, chosen)
    for name, asking in needed.items():
        for found in broken.get(name, ()):
            allowed = _allowed(found, name, needed, config, catalogue)
            where = f"{asking.key} is {values.word(asking.value)}, which needs {PROPERTIES[name]}"
            other = _alternative(asking, broken, catalogue)
            raise ConfigError(f"{found.key} must be {allowed} where {where}, got {found.value!r}{other}")


def check_needs(config: Any, catalogue: "Catalogue", needs: Collection[str], who: str) -> None:
    """Refuse an experiment that lacks what someone else needs of it.

    Args:
      config: an ExperimentConfig.
      catalogue: that its methods are from.
      needs: properties.
      who: who needs them, as in "a plan".

    Raises:
      ConfigError: "<key> must be <allowed>, for <who>, got <value>".
    """
    broken = _broken(config, catalogue.chosen(config))
    for name in PROPERTIES:
        for found in broken.get(name, ()) if name in needs else ():
            allowed = _allowed(found, name, needs, config, catalogue)
            raise ConfigError(f"{found.key} must be {allowed}, for {who}, got {found.value!r}")


def notes(config: Any, catalogue: "Catalogue") -> list[str]:
    """One line on each method that silently turns into something else in this experiment."""
    chosen = catalogue.chosen(config)
    broken = _broken(config, chosen).keys()
    found = (options.note(broken) for slot in chosen if isinstance(options := getattr(config, slot), Options))
    return [note for note in found if note]


def _needed(config: Any, chosen: Mapping[str, Method]) -> dict[str, _Claim]:
    """Property -> who needs it, in the order of `PROPERTIES`."""
    found: dict[str, _Claim] = {}
    for slot, method in chosen.items():
        for name, claim in _claims(config, slot, method, "needs"):
            found.setdefault(name, claim)
    return {name: found[name] for name in PROPERTIES if name in found}


def _broken(config: Any, chosen: Mapping[str, Method]) -> dict[str, list[_Claim]]:
    """Property -> what breaks it."""
    found: dict[str, list[_Claim]] = {}
    for slot, method in chosen.items():
        for name, claim in _claims(config, slot, method, "breaks"):
            found.setdefault(name, []).append(claim)
    for fact in _FACTS:
        value = _get(config, fact.key)
        if value is not _ABSENT and fact.broken(value, config):
            found.setdefault(fact.property, []).append(_Claim(fact.key, value, fact.allowed))
    return found


def _claims(config: Any, slot: str, method: Method, what: Literal["needs", "breaks"]) -> Iterator[tuple[str, _Claim]]:
    """What a method always needs or breaks, and what its options' values do."""
    options, key = getattr(config, slot), f"{slot}.{key_of(slot)}"
    for name in sorted(getattr(method, what)):
        yield name, _Claim(key, method.name)
    for name, option in getattr(options, what, dict)().items():
        if name not in PROPERTIES:
            raise ConfigError(f"{what} of {key} = {method.name} must be of {', '.join(PROPERTIES)}, got {name!r}")
        yield name, _Claim(f"{slot}.{option}", getattr(options, option))


def _allowed(found: _Claim, name: str, needed: Collection[str], config: Any, catalogue: "Catalogue") -> str:
    """What a key that breaks a property may be instead."""
    if found.allowed:
        return found.allowed
    slot, _, option = found.key.partition(".")
    if option == key_of(slot):
        return values.one_of([m.name for m in catalogue.by_slot[slot].values() if not m.breaks & set(needed)])
    return values.one_of([values.word(value) for value in _unbroken(getattr(config, slot), option, name)])


def _alternative(asking: _Claim, broken: Collection[str], catalogue: "Catalogue") -> str:
    """Which methods could stand in for the one that needs something, where it always does."""
    slot, _, option = asking.key.partition(".")
    if option != key_of(slot):
        return ""
    names = [m.name for m in catalogue.by_slot[slot].values() if not m.needs & set(broken)]
    return f"; or else {asking.key} must be {values.one_of(names)}" if names else ""


def _unbroken(options: Options, option: str, name: str) -> list[Any]:
    """Values of an option with which a property is whole: all words that do, or one number."""
    kind = values.field_types(type(options))[option]
    kinds = values.members(kind)
    listed = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    listed += [False, True] if bool in kinds else []
    default = next(field.default for field in dataclasses.fields(options) if field.name == option)
    tried = listed or [default, *([None] if type(None) in kinds else []), 0, 0.0, 1, 1.0, ()]
    found = []
    for value in tried:
        try:
            changed = dataclasses.replace(options, **{option: values.read(value, kind)})
        except (ValueError, TypeError):  # not one that goes with the others
            continue
        if changed.breaks().get(name) != option:
            found.append(getattr(changed, option))
    return found if listed else found[:1]


_ABSENT = object()


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, _ABSENT)
    return config
