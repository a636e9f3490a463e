"""The catalogue: what may enter it, and what it says goes together."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Literal

import pytest

from fedjax_lora.config import catalogue as catalogues
from fedjax_lora.config.catalogue import METHODS, PROPERTIES, SLOTS, Catalogue, check, check_needs, notes
from fedjax_lora.config.experiment import ConfigError, ExperimentConfig, dump, load_config
from fedjax_lora.methods import Method, Options, traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig(Options):
    """A sparsifier of a user's.

    share: of what it does.
    kind: of how.
    """

    name: Literal["mine"] = "mine"
    share: float = traced(0.5)
    kind: Literal["plain", "odd"] = "plain"
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def needs(self) -> dict[str, str]:
        return {"exact_wire": "kind"} if self.kind == "odd" else {}

    def breaks(self) -> dict[str, str]:
        return {"unchanged_where_unsent": "share"} if self.share < 1 else {}


def make(options, context):
    raise AssertionError("a configuration makes no method")


MINE = Method(
    "sparsifier", "mine", MineConfig, make, needs=frozenset({"one_rank"}), breaks=frozenset({"dense_broadcast"})
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unnamed(Options):
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Thawed:
    name: Literal["mine"] = "mine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unreadable(Options):
    name: Literal["mine"] = "mine"
    table: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Mutable:
    name: Literal["mine"] = "mine"


# The oracle of each row is the specification: one line that names the method, what is allowed and what it got.
MISTAKES = {
    "no method": (["mine"], ["methods must hold fedjax_lora.methods.Method alone, got 'mine'"]),
    "not a sequence": (3, ["methods must hold fedjax_lora.methods.Method alone, got 3"]),
    "unknown slot": ([MINE._replace(slot="sparsifer")], ["slot of method 'mine'", "'sparsifer'", "mean sparsifier?"]),
    "name of the package's": (
        [MINE._replace(name="dense", options=type(load_config(None, ["sparsifier=dense"]).sparsifier))],
        ["method 'dense' must be there once in slot sparsifier"],
    ),
    "two of one name": (
        [MINE, MINE._replace(needs=frozenset())],
        ["method 'mine' must be there once in slot sparsifier"],
    ),
    "another name": ([MINE._replace(name="other")], ["method 'other'", "name = 'other' by default, got name = 'mine'"]),
    "no dataclass": ([MINE._replace(options=dict)], ["options of method 'mine'", "a frozen dataclass, got dict"]),
    "an object": (
        [MINE._replace(options=MineConfig())],
        ["options of method 'mine'", "a frozen dataclass, got MineConfig("],
    ),
    "a mutable dataclass": ([MINE._replace(options=_Mutable)], ["a frozen dataclass, got _Mutable"]),
    "without needs": ([MINE._replace(options=_Thawed)], ["must be a subclass of Options, got _Thawed"]),
    "without a default name": ([MINE._replace(options=_Unnamed)], ["must have name = 'mine' by default, got name = "]),
    "no type of YAML": ([MINE._replace(options=_Unreadable)], ["option table of method 'mine'", "got dict"]),
    "no function": ([MINE._replace(make=None)], ["make of method 'mine'", "got None"]),
    "unknown need": (
        [MINE._replace(needs=frozenset({"basis"}))],
        ["needs of method 'mine'", "got 'basis'", "fixed_basis"],
    ),
    "unknown break": ([MINE._replace(breaks=frozenset({"x"}))], ["breaks of method 'mine'", "got 'x'"]),
}


@pytest.mark.parametrize(("methods", "fragments"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_enter_is_one_line_as_specified(methods, fragments):
    with pytest.raises(ConfigError) as caught:
        Catalogue.of(methods)
    message = str(caught.value)
    assert "\n" not in message
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_the_package_has_every_slot_and_each_name_once():
    """Oracle: the list of slots in the order in which records are made; counting."""
    names = "data task adapter model wireless control arrival sparsifier aggregation drift server training"
    assert list(SLOTS) == names.split()
    assert len({(method.slot, method.name) for method in METHODS}) == len(METHODS)
    assert Catalogue.of() == Catalogue.of([]) == Catalogue.of(METHODS)
    for method in METHODS:
        assert (method.needs | method.breaks) <= PROPERTIES.keys()
        assert Catalogue.of().find(method.slot, method.name) is method


def test_a_users_method_is_chosen_read_written_and_refused_like_the_packages(tmp_path):
    """Oracle: its options by hand; the messages as of the package's own methods."""
    text = ["sparsifier={name: mine, share: 1, weights: [2, 0.5]}"]
    config = load_config(None, text, methods=[MINE])
    assert config.sparsifier == MineConfig(share=1.0, weights=(2.0, 0.5))
    assert load_config(None, ["sparsifier=mine"], methods=MINE).sparsifier == MineConfig()
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path, methods=[MINE]) == config
    assert load_config(path, ["seed=1"], base=config, methods=[MINE]).sparsifier == config.sparsifier
    for overrides, said in {
        ("sparsifier.name=mine", "sparsifier.share=2"): "sparsifier.share must be in (0, 1], got 2.0",
        ("sparsifier={name: mine, shar: 1}",): "sparsifier.shar is not a known key, got it with value 1; did you mean "
        "sparsifier.share?",
        (
            "sparsifier={name: mine, form: a}",
        ): "sparsifier.form is a key of sparsifier.name = soft, not of mine; got it with value 'a'",
        (
            "sparsifier={name: mine, kind: od}",
        ): "sparsifier.kind must be one of plain, odd, got 'od'; did you mean odd?",
        (
            "sparsifier=min",
        ): "sparsifier.name must be one of soft, soft_rotated, dense, top_k, random_rank, svd, lora_a2, "
        "flasc, mine, got 'min'; did you mean mine?",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(None, overrides, methods=[MINE])
        assert str(caught.value) == said
    with pytest.raises(ConfigError, match=r"sparsifier.name must be one of soft, .*flasc, got 'mine'"):
        load_config(path)


def test_options_of_another_class_are_refused_by_name():
    """Oracle: the message. Python may hold what no file could."""
    config = dataclasses.replace(ExperimentConfig(), sparsifier=MineConfig())
    with pytest.raises(ConfigError, match=r"sparsifier.name must be one of soft, .*got 'mine'"):
        check(config, Catalogue.of())
    check(config, Catalogue.of([MINE]))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(MineConfig):
        pass

    with pytest.raises(ConfigError, match=r"sparsifier must be of class MineConfig where .* is mine, got Other"):
        check(dataclasses.replace(config, sparsifier=Other()), Catalogue.of([MINE]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora.client_ranks=[1, 2]"],
            "lora.client_ranks must be absent where sparsifier.name is mine, which needs one rank for all clients in "
            "all rounds, got (1, 2); or else sparsifier.name must be one of soft, soft_rotated, dense, top_k, "
            "random_rank, svd, lora_a2, flasc",
        ),
        (
            ["sparsifier.kind=odd", "wire.bits=8"],
            "wire.bits must be 32 where sparsifier.kind is odd, which needs values that arrive as they were sent, "
            "got 8",
        ),
        (
            ["aggregation=flora"],
            "sparsifier.name must be one of soft, soft_rotated, dense, top_k, random_rank, svd, lora_a2 where "
            "aggregation.name is flora, which needs clients that start from the server's whole factors, got 'mine'; or "
            "else aggregation.name must be one of fedit, ffa, fedsa",
        ),
        (
            ["aggregation={name: hetlora, prune: 1}"],
            "sparsifier.share must be 1.0 where aggregation.name is hetlora, which needs what is not sent to enter the "
            "average as no change, got 0.5; or else aggregation.name must be one of fedit, ffa, fedsa",
        ),
    ],
)
def test_a_users_needs_and_breaks_are_those_of_the_package(overrides, message):
    """Oracle: the message, from the properties that `MineConfig` and MINE name."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["sparsifier=mine", *overrides], methods=[MINE])
    assert str(caught.value) == message


ENERGIES, PRODUCTS = ("soft", "random_rank", "svd", "lora_a2"), ("fedex", "flora", "flexlora")
REFUSED = {
    *itertools.product(["fedsa"], ENERGIES),  # there is no shared b to weigh a component by
    ("hetlora", "soft"),  # by default their senders alone enter the average
    ("hetlora", "random_rank"),
    *itertools.product(["rolora", "lora_fair", *PRODUCTS], ["flasc"]),  # clients start from a part of the factors
    *itertools.product(["rolora", *PRODUCTS], ["momentum", "adam", "yogi"]),  # moments of a factor at rest, or rebuilt
    *itertools.product(["fedsa", "hetlora", "flora", "flexlora"], ["scaffold"]),  # one b, rank and basis for all
}


def test_the_methods_that_do_not_go_together_are_these():
    """Brute force over all defaults against the list of pairs above, written by hand."""
    table, base = Catalogue.of(), load_config(None, ["local.optimizer.name=sgd", "sparsifier=dense"])
    slots = ("aggregation", "sparsifier", "server", "drift")
    for names in itertools.product(*map(table.names, slots)):
        options = {slot: table.find(slot, name).options() for slot, name in zip(slots, names, strict=True)}
        options["server"] = dataclasses.replace(options["server"], learning_rate=1.0)
        expected = not any((names[0], other) in REFUSED for other in names[1:])
        try:
            check(dataclasses.replace(base, **options), table)
        except ConfigError:
            assert not expected, names
        else:
            assert expected, names


@pytest.mark.parametrize(
    ("needs", "overrides", "message"),
    [
        ({"everything_sent"}, [], "sparsifier.name must be dense, for a plan, got 'soft'"),
        (
            {"one_rank"},
            ["aggregation=hetlora", "sparsifier=dense"],
            "aggregation.prune must be 1.0, for a plan, got 0.99",
        ),
        ({"one_rank"}, ["lora.client_ranks=[1]"], "lora.client_ranks must be absent, for a plan, got (1,)"),
        (
            {"start_from_broadcast"},
            ["aggregation={name: fedex, start: keep}", "sparsifier=dense"],
            "aggregation.start must be one of average, reinit, for a plan, got 'keep'",
        ),
        (
            {"latency_alone"},
            ["control={name: tsfa, energy_budget_j: 3}"],
            "control.energy_budget_j must be null, for a plan, got 3.0",
        ),
        ({"single_attempt"}, ["wireless.retransmissions=2"], "wireless.retransmissions must be 0, for a plan, got 2"),
        ({"shared_b", "single_attempt"}, [], None),
        ({"memoryless_server"}, ["server=adam"], "server.name must be sgd, for a plan, got 'adam'"),
        ({"whole_step"}, ["server.learning_rate=0.5"], "server.learning_rate must be 1.0, for a plan, got 0.5"),
        ({"full_participation"}, ["clients.per_round=3"], "clients.per_round must be absent, for a plan, got 3"),
        ({"full_participation"}, ["clients.per_round=64"], None),
    ],
)
def test_what_someone_else_needs_is_one_line(needs, overrides, message):
    """The message itself."""
    config = load_config(None, overrides)
    if message is None:
        check_needs(config, Catalogue.of(), needs, "a plan")
        return
    with pytest.raises(ConfigError) as caught:
        check_needs(config, Catalogue.of(), needs, "a plan")
    assert str(caught.value) == message


def test_notes_are_of_what_the_rest_of_the_experiment_breaks():
    """Oracle: which of these degenerate, by hand."""

    def found(*overrides):
        return notes(load_config(None, overrides), Catalogue.of())

    fixed = "sparsifier={name: soft, send: factors, missing: zero}"
    assert found() == found(fixed, "aggregation=flora") == found("sparsifier=lora_a2", "aggregation=rolora") == []
    assert len(found(fixed)) == len(found("sparsifier=lora_a2")) == 1
    assert "fixed rank" in found(fixed)[0] and "takes turns" in found("sparsifier=lora_a2")[0]
    memory = ["sparsifier={name: soft, error_feedback: true}", "clients.count=8"]
    assert found(*memory) == [] and "harm" in found(*memory, "clients.per_round=4")[0]


@pytest.fixture
def entry_points(monkeypatch):
    """Entry points by name, as other packages would have them."""
    held = {}

    def found(group):
        assert group == "fedjax_lora.methods"
        return [SimpleNamespace(name=name, load=load) for name, load in held.items()]

    def forget():
        catalogues._of_entry_points.cache_clear()
        catalogues._catalogue.cache_clear()

    monkeypatch.setattr(catalogues.importlib.metadata, "entry_points", found)
    forget()
    yield held
    forget()


@pytest.mark.parametrize("held", [MINE, (MINE,), [MINE]])
def test_methods_of_entry_points_are_there(entry_points, held):
    entry_points["mine"] = lambda: held
    assert Catalogue.of().find("sparsifier", "mine") is MINE
    assert load_config(None, ["sparsifier=mine"]).sparsifier == MineConfig()


def test_an_entry_point_that_fails_is_one_line(entry_points):
    def fail():
        raise ImportError("no module\nnamed x")

    entry_points["mine"] = fail
    with pytest.raises(ConfigError) as caught:
        Catalogue.of()
    assert str(caught.value) == (
        "entry point mine of group fedjax_lora.methods must be importable, got ImportError: no module"
    )
