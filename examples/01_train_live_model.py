"""Train a live nn.Module on three unlike devices, emulated on this machine.

The trainer times the layers, compares all strategies, predicts the step time of the best plan and runs
exactly that plan, one worker process a device. Afterwards the trained weights are in ``model`` itself.
"""

import tempfile

import torch
from torch import nn

import spanwise
from spanwise.zoo.data import digits

CLUSTER = """
data = ["camera"]                # the training data is on this device
emulation = { core_share = 0.5 } # all devices on this machine; speed 1.0 is half a core of it
devices = [
    { id = "server", tier = "cloud", speed = 0.4 },
    { id = "box", tier = "edge", speed = 0.3 },
    { id = "camera", tier = "end", speed = 0.2 },
]
links = [{ between = ["site", "site"], bandwidth = "300 Mbit/s", latency = "1 ms" }]
"""

torch.set_num_threads(1)
torch.manual_seed(0)
train_set, test_set = digits(size=32, channels=1)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    trainer = spanwise.Trainer(
        model, nn.CrossEntropyLoss(), cluster=spanwise.Cluster.from_toml(CLUSTER), run=folder,
        batch=128, epochs=2, optimizer={"name": "Adam", "lr": 0.002},
    )  # fmt: skip
    result = trainer.fit(train_set, test_set)

for entry in result.evaluations:
    step = f"{1e3 * entry.timeline.step_time_s:.0f} ms a step" if entry.timeline else entry.reason
    print(f"{entry.strategy:24s} {step}")
for number, stage in enumerate(result.plan.stages):
    rows = ", ".join(f"{replica.device} x {replica.rows} rows" for replica in stage.replicas)
    print(f"stage {number}: layers {stage.start} to {stage.stop - 1} on {rows}")
predicted, measured = result.predicted.step_time_s, result.measured.step_time_s
print(f"step time: predicted {1e3 * predicted:.0f} ms, measured {1e3 * measured:.0f} ms")
print(f"test accuracy: {result.summary['accuracy']:.1%}")

images, labels = test_set[:5]
print("digits:", labels.tolist(), "recognised as:", model.eval()(images).argmax(1).tolist())
