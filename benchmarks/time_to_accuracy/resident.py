"""Flower without its engine: ``resident.py server|client FOLDER ADDRESS [DEVICE]``.

``start_server`` and ``start_client`` are deprecated since Flower 1.13 but still part of it. Their processes
stay for the whole run and talk over one gRPC stream, where the engine starts a process for every message and
asks for news every 3 s. So this shows Flower's FedAvg with neither of these costs.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, SimpleClientManager, start_server
from flwr.server.server import Server
from flwr.server.strategy import FedAvg
from task import SET_UP_S, Curve, Task, evaluate, meet, set_up_process, train_pass, warm_up
from torch import nn


class OverError(Exception):
    """The target is reached, or time is up."""


def arrays_of(model: nn.Module) -> list[Any]:
    return [value.detach().numpy() for value in model.state_dict().values()]


def load_arrays(model: nn.Module, arrays: list[Any]) -> None:
    state = zip(model.state_dict(), map(torch.as_tensor, arrays), strict=True)
    model.load_state_dict(dict(state))


class Trainer(NumPyClient):
    """A device: trains the model that came on its own rows and sends it back."""

    def __init__(self, task: Task, device: int) -> None:
        self.task, self.device = task, device
        self.model, self.rows = task.build_model(), task.rows(device)

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
        """``local_epochs`` passes with a fresh optimizer."""
        task = self.task
        load_arrays(self.model, parameters)
        optimizer = task.build_optimizer(self.model)
        first = (int(config["round"]) - 1) * task.local_epochs
        for epoch in range(first, first + task.local_epochs):
            order = task.order(len(self.rows[1]), self.device, epoch)
            steps = len(order) // task.local_batch
            train_pass(self.model, optimizer, task, self.rows, order, batch=task.local_batch, steps=steps)
        return arrays_of(self.model), len(self.rows[1]), {}


def serve(task: Task, address: str) -> None:
    """FedAvg over all devices, evaluated centrally after every round."""
    model, test, curve = task.build_model(), task.test_rows(), Curve.of(task)
    devices, clients = len(task.devices), SimpleClientManager()

    def examine(
        server_round: int, arrays: list[Any], _config: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        curve.stop()
        if server_round == 0:
            (task.folder / "ready-listening").touch()  # a client that finds no server gives up
            clients.wait_for(devices, timeout=int(SET_UP_S))
            meet(task, "server")
            curve.start()
            return 0.0, {}
        load_arrays(model, arrays)
        accuracy, loss = evaluate(model, test)
        if curve.add(accuracy, loss):
            raise OverError
        curve.start()
        return loss, {"accuracy": accuracy}

    strategy = FedAvg(
        fraction_evaluate=0.0, min_fit_clients=devices, min_available_clients=devices, evaluate_fn=examine,
        initial_parameters=ndarrays_to_parameters(arrays_of(model)),
        on_fit_config_fn=lambda server_round: {"round": server_round},
    )  # fmt: skip
    server = Server(client_manager=clients, strategy=strategy)
    with contextlib.suppress(OverError):
        start_server(
            server_address=address, server=server,
            config=ServerConfig(num_rounds=task.passes),
        )  # fmt: skip


def main(role: str, folder: str, address: str, device: str = "0") -> None:
    set_up_process()
    task = Task.load(folder)
    if role == "server":
        serve(task, address)
        return
    trainer = Trainer(task, int(device))
    warm_up(task, trainer.rows, task.local_batch)
    start_client(server_address=address, client=trainer.to_client(), insecure=True, max_wait_time=SET_UP_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
