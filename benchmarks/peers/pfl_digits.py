"""The round in pfl-research: its simulated backend and federated averaging. It prints one line of JSON.

Several processes share the clients where `torch.distributed.run` starts them; the first of them reports.
"""

import os

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from process_tree import Tree
from torch_digits import Record, Round, Vit, load, optimizer, trained


class PflVit(Vit):
    """The model with the metrics that pfl asks for, and the sum and number of its training losses."""

    def __init__(self):
        super().__init__()
        self.losses = torch.zeros(2)

    def loss(self, patches: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch, which is added to the sum."""
        loss = super().loss(patches, labels)
        self.losses += torch.stack([loss.detach(), torch.ones(())])
        return loss

    @torch.no_grad()
    def metrics(self, patches: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        """Loss of a user, which pfl evaluates in the first round alone."""
        return {"loss": Weighted(float(super().loss(patches, labels)) * len(labels), len(labels))}


class EndOfRound(TrainingProcessCallback):
    """Records when each round ends, with the mean training loss of all processes."""

    def __init__(self, module: PflVit, record: Record):
        self._module = module
        self._record = record

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """The server's step is done."""
        assert pytorch_ops.distributed is not None
        total, count = pytorch_ops.distributed.all_reduce([self._module.losses])[0].tolist()
        self._record.end(total / count)
        self._module.losses.zero_()
        return False, Metrics()


def main() -> None:
    """Run the rounds that the command line asks for."""
    shape = Round.parse()
    patches, labels = load(shape.data)
    module = shape.prepare(PflVit)
    parameters = trained(module)

    def user(number: int) -> PyTorchTensorDataset:
        rows = shape.rows(number)
        return PyTorchTensorDataset((patches[rows], labels[rows]), user_id=str(number))

    data = FederatedDataset(user, get_user_sampler("minimize_reuse", range(shape.clients)))
    model = PyTorchModel(
        module,
        lambda _, lr: optimizer(parameters, lr),
        torch.optim.SGD(parameters, lr=1.0),
    )
    record = Record(shape, Tree(os.getppid() if shape.workers > 1 else os.getpid()))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=1 + shape.rounds,
            evaluation_frequency=2 + shape.rounds,
            train_cohort_size=shape.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=shape.learning_rate, local_batch_size=shape.batch),
        callbacks=[EndOfRound(module, record)],
        send_metrics_to_platform=False,
    )
    if pytorch_ops.distributed is not None and pytorch_ops.distributed.global_rank == 0:
        count = sum(p.numel() for p in parameters)
        record.print(count, backend="SimulatedBackend", evaluation="in the warm-up round alone")


if __name__ == "__main__":
    main()
