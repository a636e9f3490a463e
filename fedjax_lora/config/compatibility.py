"""Which methods go together: each rule ends in one line that names the key, what it got and what is allowed."""

from typing import Any


def check(config: Any) -> None:
    """Raise ValueError where the sections of an `ExperimentConfig` do not go together."""
    _data(config)
    _ranks(config)
    _sparsifier(config)
    _scaffold(config)
    _server(config)
    _products(config)
    _plan(config)


def _data(config: Any) -> None:
    source, pretrained = config.data.source, config.model.pretrained
    if source == "tsv" and pretrained is None:
        raise ValueError(
            "model.pretrained must be a folder or a Hugging Face model id where data.source is tsv, got None"
        )
    if source == "digits" and pretrained is not None:
        raise ValueError(f"model.pretrained must be absent where data.source is digits, got {pretrained!r}")


def _ranks(config: Any) -> None:
    ranks = config.lora.client_ranks
    if ranks and config.drift.name == "scaffold":
        raise ValueError(
            f"lora.client_ranks must be absent where drift.name is scaffold, "
            f"whose mean is over all clients, got {ranks}"
        )
    prune = getattr(config.aggregation, "prune", 1.0)
    if prune < 1.0 and config.drift.name == "scaffold":
        raise ValueError(
            f"aggregation.prune must be 1.0 where drift.name is scaffold, whose mean is over all clients, got {prune}"
        )


def _sparsifier(config: Any) -> None:
    aggregation, sparsifier = config.aggregation.name, config.sparsifier
    if aggregation == "fedsa" and sparsifier.name in ("soft", "random_rank", "svd", "lora_a2"):
        raise ValueError(
            "sparsifier.name must be one of dense, soft_rotated, top_k, flasc where aggregation.name is fedsa, "
            f"which sends no b to weigh a component by, got {sparsifier.name!r}"
        )
    if aggregation == "hetlora" and getattr(sparsifier, "missing", "zero") == "senders":
        raise ValueError(
            "sparsifier.missing must be zero where aggregation.name is hetlora, "
            "which pads with zeros what a client does not send, got 'senders'"
        )
    if aggregation == "hetlora" and sparsifier.name == "soft" and sparsifier.send == "factors":
        raise ValueError(
            "sparsifier.send must be change where aggregation.name is hetlora, "
            "which would pull a component that is not sent to zero, got 'factors'"
        )
    if aggregation == "rolora" and sparsifier.name == "flasc":
        raise ValueError(
            "sparsifier.name must be another than flasc where aggregation.name is rolora, "
            "whose resting factor must be the same for clients and server, got 'flasc'"
        )
    by_energy = config.control.name == "tsfa" and config.control.tail != "linear"
    if by_energy and getattr(sparsifier, "error_feedback", False):
        raise ValueError(
            "sparsifier.error_feedback must be false where control.name is tsfa, whose tail energies do not "
            "count what a client remembers, unless control.tail is linear, got True"
        )
    if aggregation == "lora_fair" and sparsifier.name == "flasc":
        raise ValueError(
            "sparsifier.name must be another than flasc where aggregation.name is lora_fair, "
            "whose correction is of whole factors, got 'flasc'"
        )


def _scaffold(config: Any) -> None:
    if config.drift.name != "scaffold":
        return
    if config.local.optimizer.name != "sgd":
        raise ValueError(
            f"local.optimizer.name must be sgd where drift.name is scaffold, got {config.local.optimizer.name!r}"
        )
    if config.local.optimizer.clip_norm is not None:
        raise ValueError(
            "local.optimizer.clip_norm must be absent where drift.name is scaffold, whose control variates are read "
            f"from the path of unclipped gradients, got {config.local.optimizer.clip_norm}"
        )
    if config.aggregation.name == "fedsa":
        raise ValueError(
            "aggregation.name must be another than fedsa where drift.name is scaffold, "
            "which would pull the clients' own b together, got 'fedsa'"
        )


def _server(config: Any) -> None:
    if config.aggregation.name == "rolora" and config.server.name != "sgd":
        raise ValueError(
            "server.name must be sgd where aggregation.name is rolora, "
            f"since moments would decay while a factor rests, got {config.server.name!r}"
        )


def _products(config: Any) -> None:
    """What goes with a method that merges into the base, or that gives the factors another basis."""
    name, server = config.aggregation.name, config.server
    merges = name in ("fedex", "flora")
    start = getattr(config.aggregation, "start", None)
    rebases = name in ("flora", "flexlora") or start in ("reinit", "keep")
    where = f"where aggregation.name is {name}"
    if merges and config.model.compute_dtype != "float32":
        raise ValueError(f"model.compute_dtype must be float32 {where}, got {config.model.compute_dtype!r}")
    if (merges or rebases) and server.name != "sgd":
        raise ValueError(f"server.name must be sgd {where}, got {server.name!r}")
    if (merges or rebases) and server.learning_rate != 1.0:
        raise ValueError(f"server.learning_rate must be 1.0 {where}, got {server.learning_rate}")
    if (merges or rebases) and config.sparsifier.name == "flasc":
        raise ValueError(f"sparsifier.name must be another than flasc {where}, got 'flasc'")
    if rebases and config.drift.name == "scaffold":
        raise ValueError(f"drift.name must be none or fedprox {where}, got 'scaffold'")
    for key, holds, allowed, got in (
        ("sparsifier.name", config.sparsifier.name == "dense", "dense", config.sparsifier.name),
        ("wire.bits", config.wire.bits == 32, "32", config.wire.bits),
        ("lora.client_ranks", not config.lora.client_ranks, "absent", config.lora.client_ranks),
    ):
        if start == "keep" and not holds:
            raise ValueError(f"{key} must be {allowed} where aggregation.start is keep, got {got!r}")
    if rebases and getattr(config.sparsifier, "error_feedback", False):
        raise ValueError(f"sparsifier.error_feedback must be false {where}, got True")


def _plan(config: Any) -> None:
    candidates, most = config.plan.candidates, config.lora.max_rank
    if max(candidates, default=1) > most:
        raise ValueError(f"plan.candidates must be at most lora.max_rank = {most}, got {candidates}")
