"""The round in Flower's simulation engine: Ray's actors train the clients, FedAvg averages.

It prints one line of JSON. `run_simulation` is what `flwr run` comes to, without the service around it; it warns that
the command line is to replace it.
"""

import dataclasses
import os
from collections.abc import Iterable

import flower_client
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from process_tree import Tree
from torch_digits import Record, Round


class TimedFedAvg(FedAvg):
    """FedAvg over all clients without evaluation, which records when each round ends."""

    def __init__(self, clients: int, record: Record):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._clients = clients
        self._record = record

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies of all clients; RuntimeError where one failed."""
        replies = list(replies)
        failed = sum(reply.has_error() for reply in replies)
        if failed or len(replies) != self._clients:
            raise RuntimeError(f"all {self._clients} clients must reply, got {len(replies)} replies, {failed} failed")
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert metrics is not None
        self._record.end(float(metrics["loss"]))  # pyright: ignore
        return arrays, metrics


def main() -> None:
    """Run the rounds that the command line asks for."""
    shape = Round.parse()
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        start = flower_client.trainer(shape).vector()
        record = Record(shape, Tree(os.getpid()))
        TimedFedAvg(shape.clients, record).start(
            grid=grid,
            initial_arrays=flower_client.vector_record(start),
            num_rounds=1 + shape.rounds,
            train_config=ConfigRecord(dataclasses.asdict(shape)),
        )
        record.print(len(start), backend="ray", parameters_sent_as="one array", evaluation="off")

    cores = shape.workers * shape.threads
    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=shape.clients,
        backend_config={"init_args": {"num_cpus": cores}, "client_resources": {"num_cpus": shape.threads}},
    )


if __name__ == "__main__":
    main()
