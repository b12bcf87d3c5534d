"""What a run looked like: numbers, one HTML page, a Chrome trace, a plan in words."""

from __future__ import annotations

import json
from pathlib import Path

from spanwise.core.noun import write_whole
from spanwise.core.run_folder import RunFolder
from spanwise.reporting.chrome import chrome_trace
from spanwise.reporting.html import page
from spanwise.reporting.metrics import error_ratio, summarize
from spanwise.reporting.record import RunRecord
from spanwise.reporting.text import describe_plan, plan_table

__all__ = ["chrome_trace", "describe_plan", "error_ratio", "plan_table", "summarize", "write_report"]


def write_report(folder: RunFolder) -> Path:
    """Writes ``report.html`` and ``trace.json`` of a run and returns the path of the report.

    Only ``job.json`` must be there; the report says what else is missing in its place.

    Raises:
        InputError: a file of the run is broken, or plan and graph do not belong together.
        ResourceError: the folder cannot be written.
    """
    record = RunRecord.read(folder)
    write_whole(folder.report, page(record))
    write_whole(folder.trace, json.dumps(chrome_trace(record.timelines), separators=(",", ":")) + "\n")
    return folder.report
