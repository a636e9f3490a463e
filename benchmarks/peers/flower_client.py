"""The client of the Flower peer, in a module of its own: Ray's actors import it by name, once."""

import functools
import importlib
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch_digits import Round

app = ClientApp()


@functools.cache
def trainer(shape: Round) -> Any:
    """The actor's data and model, made at its first message."""
    return importlib.import_module(shape.trainer).Trainer(shape)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client from the vector in the message."""
    config: dict[str, Any] = dict(message.content.config_records["config"])
    del config["server-round"]
    start = message.content.array_records["arrays"]["vector"].numpy()
    vector, loss = trainer(Round(**config)).train(start, int(context.node_config["partition-id"]))
    content = RecordDict({"arrays": vector_record(vector), "metrics": MetricRecord({"num-examples": 1, "loss": loss})})
    return Message(content, reply_to=message)


def vector_record(vector: np.ndarray) -> ArrayRecord:
    """All parameters as one array, which costs less than one for each."""
    return ArrayRecord({"vector": Array(vector)})
