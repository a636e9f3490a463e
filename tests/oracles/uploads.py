"""Uploads as the server decodes them, made without a sparsifier: for tests of what comes after."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lora.core.exchange import Live, Received
from fedjax_lora.core.types import Adapters, Factors

WHOLE = Live()


def uploads(start, trained, ranks, live=WHOLE, keep=None, counts="senders"):
    """What arrives of `trained`, `[C, ...]`: what was not sent is filled in with the broadcast.

    Args:
      start: the broadcast.
      trained: what the clients hold.
      ranks: `[R]` or `[C, R]` masks of their structural ranks.
      live: what is sent.
      keep: how many components of each matrix are sent, those of the largest change; None for all.
      counts: where a client has a say: in what it sends ("senders"), or in all of its ranks ("owners").

    Returns:
      `Received` of the cohort.
    """
    clients = jax.tree.leaves(trained)[0].shape[0]
    modules, counted = {}, {}
    for name, f in trained.modules.items():
        old = start.modules[name]
        owned = np.broadcast_to(np.asarray(ranks).reshape(-1, 1, f.a.shape[-1]), (clients, *f.b.shape[1:3])) > 0
        change = np.sum((f.a - old.a) ** 2, axis=2) * live.a + np.sum((f.b - old.b) ** 2, axis=3) * live.b
        order = np.argsort(-np.where(owned, change, -1.0), axis=-1, kind="stable")
        place = np.argsort(order, axis=-1)
        sent = owned & (place < (owned.shape[-1] if keep is None else keep))
        modules[name] = Factors(
            a=jnp.where(sent[:, :, None, :] & (live.a > 0), f.a, old.a),
            b=jnp.where(sent[..., None] & (live.b > 0), f.b, old.b),
        )
        counted[name] = jnp.float32(sent if counts == "senders" else owned)
    head = jax.tree.map(lambda new, old: jnp.where(live.head > 0, new, old), trained.head, start.head)
    return Received(adapters=Adapters(modules=modules, head=head), counted=counted)
