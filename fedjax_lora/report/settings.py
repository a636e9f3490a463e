"""What was run: in one line, and option by option."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_lora.config.catalogue import SLOTS, Catalogue
from fedjax_lora.config.experiment import ExperimentConfig, to_dict
from fedjax_lora.config.values import key_of
from fedjax_lora.io.run_files import flatten
from fedjax_lora.report.formats import last_name, option, setting
from fedjax_lora.report.runs import Run, differing_keys


class _Piece(NamedTuple):
    """A few words of the heading, and the options they tell of."""

    text: str
    keys: tuple[str, ...]


def heading(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs have in common, in a few words on each of: model, data, clients, method, ...

    Pieces that differ between runs are left out; where nothing is left, it says so.
    """
    differing = set(differing_keys(runs))
    parts = {}
    for label, pieces in _pieces(runs[0].config).items():
        shared = [piece.text for piece in pieces if differing.isdisjoint(piece.keys)]
        if pieces:
            parts[label] = ", ".join(shared) or "differs"
    return parts


def other_than_default(config: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values are not the defaults, a section's being those of the method that it names."""
    defaults = _defaults(config)
    return [key for key, value in config.items() if key not in defaults or defaults[key] != value]


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    tree, catalogue = to_dict(ExperimentConfig()), Catalogue.of()
    for slot in SLOTS:
        key, default = key_of(slot), tree[slot][key_of(slot)]
        chosen = config.get(f"{slot}.{key}", default)
        method = catalogue.by_slot[slot].get(str(chosen))  # None for a user's own
        if chosen != default:
            tree[slot] = {field.name: _default(field) for field in dataclasses.fields(method.options)} if method else {}
        tree[slot][key] = default
    # As YAML has it: no tuples.
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(tree).items()}


def _default(field: dataclasses.Field) -> Any:
    """Of an option; a section of options as a mapping, and None where one must be given."""
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return None if field.default is dataclasses.MISSING else field.default


def _pieces(config: Mapping[str, Any]) -> dict[str, list[_Piece]]:
    """Label -> pieces; only of options that the configuration has."""
    chosen = other_than_default(config)

    def piece(form: str, *keys: str, by: str = "") -> list[_Piece]:
        """`form` filled with the values of the keys; it tells of the key `by` as well."""
        values = [config.get(key) for key in keys]
        text = form.format(*map(_short, values))
        return [] if None in values else [_Piece(text, (*keys, by))]

    def section(prefix: str, *always: str) -> list[_Piece]:
        """What it names `always`, and the options that were chosen."""
        keys = dict.fromkeys([*(f"{prefix}.{name}" for name in always), *chosen])
        return [
            _Piece(_short(config[key]) if key.endswith(".name") else option(key, config[key]), (key,))
            for key in keys
            if key.startswith(f"{prefix}.") and config.get(key) is not None
        ]

    spread = {
        "dirichlet": ("dirichlet {}", "clients.partition.alpha"),
        "shards": ("{} shards a client", "clients.partition.shards_per_client"),
        "sampled": ("{} examples drawn by each", "clients.partition.examples"),
    }.get(config.get("clients.partition.kind", ""), ("{}", "clients.partition.kind"))
    tokens = piece("at most {} tokens", "data.max_length", by="data.train")
    return {
        "model": piece("{}", "model.pretrained") or piece("{}", "model.name", by="model.pretrained"),
        "data": [
            *piece("{}", "data.source"),
            *piece("{}", "data.train"),
            *piece("{}", "data.test"),
            *(tokens if config.get("data.train") else []),
        ],
        "clients": [
            *(
                piece("{} of {} a round", "clients.per_round", "clients.count")
                or piece("{}, all every round", "clients.count", by="clients.per_round")
            ),
            *piece(*spread, by="clients.partition.kind"),
        ],
        "method": [
            *section("sparsifier", "name"),
            *section("aggregation", "name"),
            *(found for prefix in ("drift", "server", "wire") for found in section(prefix)),
            *piece("rank {}", "lora.rank"),
        ],
        "control": [
            *section("control", "name", "keep_ratio", "latency_budget_s"),
            *section("arrival"),
        ],
        "training": [
            *piece("{} rounds", "rounds"),
            *piece("{} steps × batch {}", "local.steps", "local.batch_size"),
            *section("local.optimizer", "name", "learning_rate"),
        ],
        "seed": piece("{}", "seed"),
    }


def _short(value: Any) -> str:
    """A value in full, but of a path or a hub id what it ends in."""
    return last_name(value) if isinstance(value, str) else setting(value).text
