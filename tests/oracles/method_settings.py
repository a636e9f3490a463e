"""Settings of the toy simulation in which every method with numbers, or with code of its own in a round, takes part."""

SETTINGS = {
    "dense, fedit, ideal": ("sparsifier=dense", "control={name: ideal}"),
    "soft, ffa, tsfa, estimated channels": (
        "aggregation=ffa",
        "control={name: tsfa, V: 3.0, latency_budget_s: 1.0, energy_budget_j: 0.05, max_keep_ratio: 0.9}",
        "wireless={fading: rician, csi: estimated, retransmissions: 1, downlink: true, path_loss: umi}",
        "local.optimizer={name: adamw, schedule: cosine, warmup_steps: 2, weight_decay: 0.1, clip_norm: 1.0}",
    ),
    "hetlora of ranks, fedprox, yogi, greedy": (
        "sparsifier={name: soft, missing: zero}",
        "aggregation={name: hetlora, prune: 0.9}",
        "lora.client_ranks=[1, 2, 3]",
        "drift.name=fedprox",
        "server.name=yogi",
        "control={name: greedy}",
        "local.optimizer={name: momentum, momentum: 0.8}",
    ),
    "top_k, lora_fair, momentum, proportional": (
        "sparsifier={name: top_k}",
        "aggregation.name=lora_fair",
        "server={name: momentum}",
        "control={name: proportional}",
        "local.optimizer.name=sgd",
    ),
    "flasc, fedsa, adam, fixed": (
        "sparsifier={name: flasc}",
        "aggregation=fedsa",
        "server.name=adam",
        "wireless.path_loss=uma",
    ),
    "soft_rotated, flora, uniform": ("sparsifier=soft_rotated", "aggregation=flora", "control={name: uniform}"),
    "random_rank, flexlora, 8 bits": ("sparsifier=random_rank", "aggregation=flexlora", "wire.bits=8"),
    "lora_a2, rolora, scaffold": (
        "sparsifier=lora_a2",
        "aggregation=rolora",
        "drift=scaffold",
        "local.optimizer.name=sgd",
    ),
    "svd, fedex": ("sparsifier=svd", "aggregation=fedex"),
    "split, soft, split_lyapunov": (
        "training={name: split, device_layers: 1, tail_layers: 1, exchange: int8}",
        "control={name: split_lyapunov, V: 3.0, over_rounds: geometric}",
        "wireless.downlink=true",
    ),
    "split frozen, dense, round_robin": (
        "training={name: split, device_layers: 2, device_adapters: frozen, exchange: bfloat16}",
        "sparsifier=dense",
        "control={name: round_robin, keep_ratio: 0.7}",
        "clients.per_round=3",
    ),
    "split of the task, best_channel": (
        "training={name: split, task: server}",
        "sparsifier=dense",
        "control={name: best_channel, keep_ratio: 0.7}",
        "clients.per_round=3",
    ),
    "split in turn, one server copy": (
        "training={name: split, device_layers: 1, device_adapters: frozen, task: server, server_adapters: shared}",
        "training.order=sequential",
        "training.cache_activations=true",
        "sparsifier=dense",
        "control={name: best_channel, keep_ratio: 0.7}",
        "clients.per_round=3",
    ),
    "card": (
        "training={name: card, energy_scale_j: 0.01}",
        "sparsifier=dense",
        "control={name: uniform, keep_ratio: 0.7}",
    ),
    "split pipelined, by energy": (
        "training={name: split, task: server, pipelined: true}",
        "sparsifier=dense",
        "control={name: split_lyapunov, V: 1e-6, latency_budget_s: null, energy_budget_j: 0.001}",
    ),
    "proportional_fair": ("control={name: proportional_fair, keep_ratio: 0.7}", "clients.per_round=3"),
    "buffered, of a sampled population": (
        "arrival={name: buffered, buffer: 2, exponent: 0.7}",
        "clients.partition={kind: sampled, examples: 5}",
        "clients.per_round=4",
        "server={name: momentum}",
    ),
    "min_latency": ("control={name: min_latency, keep_ratio: 0.7}", "clients.per_round=3"),
}
"""What differs from `toy.SETTINGS` -> overrides."""
