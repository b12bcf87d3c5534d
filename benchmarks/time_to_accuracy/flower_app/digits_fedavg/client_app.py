"""Flower's ClientApp: a device trains the model that came on its own rows and sends it back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Task, process_age_s, set_up_process, train_pass

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """``local_epochs`` passes with a fresh optimizer, as Flower's PyTorch template does."""
    set_up_process()
    task = Task.load(str(context.run_config["folder"]))
    device = int(context.node_config["partition-id"])
    model = task.build_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = task.rows(device)
    optimizer = task.build_optimizer(model)
    optimizer.zero_grad()  # the first call imports torch._dynamo: start of a process, not training
    start_s = process_age_s()  # the engine starts a process for every message
    first = (int(message.content["config"]["server-round"]) - 1) * task.local_epochs
    for epoch in range(first, first + task.local_epochs):
        order = task.order(len(rows[1]), device, epoch)
        steps = len(order) // task.local_batch
        loss = train_pass(model, optimizer, task, rows, order, batch=task.local_batch, steps=steps)
    metrics = {
        "num-examples": len(rows[1]),
        "loss": loss,
        "start_s": start_s,
        "train_s": process_age_s() - start_s,
    }
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
