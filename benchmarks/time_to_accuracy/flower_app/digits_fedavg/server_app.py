"""Flower's ServerApp: FedAvg over all devices, evaluated centrally after every round."""

from __future__ import annotations

import contextlib
import time

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import POLL_S, Curve, Task, evaluate, meet, set_up_process

app = ServerApp()


class OverError(Exception):
    """The target is reached, or time is up: FedAvg itself only ends after a number of rounds."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Waits for all devices, then trains until the target is reached."""
    set_up_process()
    task = Task.load(str(context.run_config["folder"]))
    model, test, curve = task.build_model(), task.test_rows(), Curve.of(task)
    initial = ArrayRecord(model.state_dict())
    slowest: dict[str, float] = {}

    def of_slowest(replies: list[RecordDict], _weighted_by: str) -> MetricRecord:
        for name in ("start_s", "train_s"):
            slowest[name] = max(float(reply["metrics"][name]) for reply in replies)
        return MetricRecord(dict(slowest))

    def examine(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        curve.stop()
        if server_round == 0:  # FedAvg asks before the first round too: there the clock starts
            curve.start()
            return MetricRecord({})
        model.load_state_dict(arrays.to_torch_state_dict())
        accuracy, loss = evaluate(model, test)
        if curve.add(accuracy, loss, **slowest):
            raise OverError
        curve.start()
        return MetricRecord({"accuracy": accuracy})

    devices = len(task.devices)
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices,
        train_metrics_aggr_fn=of_slowest,
    )  # fmt: skip
    while len(list(grid.get_node_ids())) < devices:
        time.sleep(POLL_S)
    meet(task, "server")
    with contextlib.suppress(OverError):
        strategy.start(grid, initial, num_rounds=task.passes, evaluate_fn=examine)
