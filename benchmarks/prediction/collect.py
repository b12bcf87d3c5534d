"""A second prediction table: every plan of spanwise that the newest cells of the throughput table ran."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import HERE, draw, errors_of

RAW = HERE.parent / "throughput" / "raw" / "throughput.json"


def rows_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and measured step time of `auto` and of the further strategies in every cell."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        auto = [s for one in cell["rounds"]["auto"] for s in one["step_s"]]
        runs = {cell["auto_strategy"]: (cell["predicted_step_time_s"], auto)}
        runs |= {
            name: (found["predicted_s"], found["step_s"]) for name, found in cell.get("plans", {}).items()
        }
        for strategy, (predicted_s, step_s) in runs.items():
            if step_s:
                measured_s = statistics.median(step_s)
                rows.append(
                    {
                        "cluster": cell["cluster"], "model": cell["model"], "batch": cell["batch"],
                        "strategy": strategy, "predicted_s": predicted_s, "measured_s": measured_s,
                        "error": predicted_s / measured_s - 1,
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    data = json.loads(RAW.read_text(encoding="utf-8"))
    # Cells kept from an earlier day were predicted by the model of that day.
    rows = rows_of([cell for cell in data["cells"] if cell.get("date", data["date"]) == data["date"]])
    result = {
        "benchmark": "prediction", "date": data["date"], "environment": data["environment"],
        "from": "../throughput/raw/throughput.json", **errors_of(rows), "rows": rows,
    }  # fmt: skip
    print({key: value for key, value in result.items() if key not in ("rows", "environment")})
    for row in sorted(rows, key=lambda r: r["error"]):
        print("| {cluster} | {model} | {batch} | {strategy} | {predicted_s:.3f} | {measured_s:.3f} | "
              "{error:+.1%} |".format(**row))  # fmt: skip
    (HERE / "raw").mkdir(exist_ok=True)
    (HERE / "raw" / "collected.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(rows, HERE / "collected.svg")


if __name__ == "__main__":
    main()
