"""Numbers, traces, texts and the parts that drawings are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from reporting_run import hybrid_plan, play, single_plan, small_graph, write_run
from rich.console import Console

from server_cases import served, server_plan
from spanwise.core.defaults import default_cluster
from spanwise.core.timeline import DeviceUse, MemoryPoint, Span, Timeline
from spanwise.planner.segments.chain import Cuts
from spanwise.reporting import chrome_trace, describe_plan, error_ratio, plan_table, summarize, write_report
from spanwise.reporting.axis import axis, time_unit
from spanwise.reporting.curves import buckets
from spanwise.reporting.markup import Markup, el, fit, join
from spanwise.reporting.stages import stage_map
from spanwise.reporting.step import Bar, merge, step_view
from spanwise.reporting.transfers import name_transfers


def timeline(**changes: Any) -> Timeline:
    use = DeviceUse(device="a", busy_s=0.5, utilization=0.5, peak_memory_bytes=7, sent_bytes=3)
    values: dict[str, Any] = {"origin": "simulated", "step_time_s": 1.0, "devices": (use,), **changes}
    return Timeline(**values)


def span(lane: str, kind: str, start: float, end: float, step: int = 0, action: str = "") -> Span:
    return Span(
        lane=lane, kind=kind, action=action or f"{kind} s0 m1 [0:8)", start_s=start, end_s=end, step=step
    )


def keys(data: Mapping[str, object], depth: int = 2) -> set[str]:
    found = set(data)
    for name in ("predicted", "measured"):
        if depth and isinstance(data.get(name), Mapping):
            found |= {f"{name}.{k}" for k in keys(cast("Mapping[str, object]", data[name]), depth - 1)}
    return found


class TestSummarize:
    def test_keys_never_change(self) -> None:
        simulated, measured = timeline(), timeline(origin="measured", step_time_s=1.25)
        sides = [(None, None), (simulated, None), (None, measured), (simulated, measured)]
        every = [keys(summarize(*pair, batch=10)) for pair in sides]
        assert all(one == every[0] for one in every)
        bare = [keys(summarize(*pair)) for pair in sides]
        rates = {f"{side}throughput_samples_per_s" for side in ("", "predicted.", "measured.")}
        assert all(one == every[0] - rates for one in bare)
        assert {"step_time_s", "throughput_samples_per_s", "devices", "error_ratio"} < every[0]
        assert {"predicted.step_time_s", "measured.devices"} < every[0]

    def test_numbers(self) -> None:
        told = summarize(timeline(), timeline(origin="measured", step_time_s=1.25), batch=10)
        assert told["step_time_s"] == 1.25
        assert told["throughput_samples_per_s"] == 8.0
        assert told["error_ratio"] == pytest.approx(-0.2)
        assert told["devices"] == {"a": {"utilization": 0.5, "peak_memory_bytes": 7, "sent_bytes": 3}}

    def test_prediction_stands_in_for_a_run(self) -> None:
        told = summarize(timeline(), None)
        assert told["step_time_s"] == 1.0
        assert told["measured"] == {"step_time_s": None, "devices": {}}
        assert json.loads(json.dumps(told)) == told

    def test_error_ratio_needs_both(self) -> None:
        assert error_ratio(None, 1.0) is error_ratio(1.0, 0.0) is error_ratio(0.0, 1.0) is None


class TestChromeTrace:
    def test_schema(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path)
        write_report(folder)
        events = json.loads(folder.trace.read_text(encoding="utf-8"))["traceEvents"]
        measured = Timeline.load(folder.measured)
        assert {e["ph"] for e in events} == {"M", "X", "C"}
        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        assert names == {1: "simulated", 2: "measured"}
        lanes = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
        assert {s.lane for s in measured.spans} <= set(lanes)
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
        assert len(spans) == len(measured.spans)
        for event in spans:
            assert event["dur"] >= 0
            assert {"name", "cat", "ts", "dur", "pid", "tid", "args"} <= set(event)
        last = max(s.end_s for s in measured.spans)
        assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(last * 1e6)

    def test_one_track_per_lane_unless_spans_overlap(self) -> None:
        spans = (span("a>b", "send", 0.0, 2.0), span("a>b", "send", 1.0, 3.0), span("a", "forward", 0, 1),
                 span("a", "forward", 1, 2))  # fmt: skip
        events = cast("list[dict[str, Any]]", chrome_trace([timeline(spans=spans)])["traceEvents"])
        tracks = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
        assert tracks == ["a", "a>b", "a>b (2)"]
        by_tid: dict[int, float] = {}
        for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
            assert event["ts"] >= by_tid.get(event["tid"], 0.0)
            by_tid[event["tid"]] = event["ts"] + event["dur"]

    def test_memory_counts(self) -> None:
        memory = (MemoryPoint(device="a", at_s=0.5, bytes=9),)
        events = cast("list[dict[str, Any]]", chrome_trace([timeline(memory=memory)])["traceEvents"])
        counters = [e for e in events if e["ph"] == "C"]
        assert [(c["ts"], c["args"]) for c in counters] == [(0.5e6, {"bytes": 9})]

    def test_nothing(self) -> None:
        assert chrome_trace([])["traceEvents"] == []


class TestStepView:
    def test_last_simulated_step_starts_at_zero(self) -> None:
        spans = (span("a", "forward", 0, 1, 0), span("a", "wait", 1, 3, 1), span("a", "forward", 3, 4, 1),
                 span("b", "wait", 0.5, 3.5, 1), span("b", "backward", 3.5, 5, 1))  # fmt: skip
        view = step_view(timeline(spans=spans))
        assert view is not None
        assert view.step == 1
        assert view.end_s == 2.0
        assert [(b.style, b.start_s, b.end_s) for b in view.lanes["a"]] == [("fwd", 0.0, 1.0)]
        assert [(b.style, b.start_s, b.end_s) for b in view.lanes["b"]] == [("wait", 0, 0.5), ("bwd", 0.5, 2)]

    def test_most_typical_measured_step(self) -> None:
        lengths = (9.0, 2.1, 1.9, 5.0)
        spans = tuple(span("a", "forward", 10 * k, 10 * k + n, k) for k, n in enumerate(lengths))
        view = step_view(timeline(origin="measured", step_time_s=2.05, spans=spans))
        assert view is not None
        assert view.step == 1

    def test_no_spans(self) -> None:
        assert step_view(timeline()) is None
        assert step_view(timeline(spans=(span("a", "wait", 0, 1),))) is None

    @pytest.mark.parametrize(
        ("kind", "action", "style"),
        [
            ("send", "send activation s0 m1 [0:8) to b #1 4B", "act"),
            ("recv", "recv gradient s0 m1 [0:8) from b #1 4B", "grad"),
            ("transfer", "send label m1 [0:8) to b #1 4B", "inp"),
            ("activation", "#1", "act"),
            ("reduce", "reduce y0.0 4B over a,b", "red"),
            ("odd", "odd", "other"),
        ],
    )
    def test_colours(self, kind: str, action: str, style: str) -> None:
        view = step_view(timeline(spans=(span("a>b", kind, 0, 1, action=action),)))
        assert view is not None
        assert view.lanes["a>b"][0].style == style

    def test_merge_joins_only_what_is_too_short_to_see(self) -> None:
        bars = [Bar("act", "x", i * 0.01, i * 0.01 + 0.005) for i in range(100)]
        bars += [Bar("act", "long", 2, 3), Bar("grad", "other", 3, 3.001)]
        merged = merge(bars, 0.02)
        assert [b.count for b in merged] == [100, 1, 1]
        assert merged[0].end_s == pytest.approx(0.995)
        assert merge(bars, 0.0) == tuple(bars)


class TestTransfers:
    @staticmethod
    def measured(*, drop: int = 0) -> tuple[Timeline, Timeline]:
        """A timeline as it was, and as a network recorder would tell it."""
        graph = small_graph()
        known = play(hybrid_plan(graph), graph, default_cluster(), noise=0.1, steps=2)
        spans = tuple(s for s in known.spans if s.kind != "reduce")
        spans = tuple(s for s in spans if s.kind == "send")[drop:] + tuple(
            s for s in spans if s.kind != "send"
        )
        bare = tuple(
            s.model_copy(update={"kind": "transfer", "action": s.action.rsplit(" ", 1)[-1]})
            if s.kind == "send"
            else s
            for s in spans
        )
        return known.model_copy(update={"spans": spans}), known.model_copy(update={"spans": bare})

    def test_messages_get_back_their_actions(self) -> None:
        known, bare = self.measured()
        graph = small_graph()
        assert len(known.spans) > 50
        assert name_transfers(bare, hybrid_plan(graph), graph) == known
        assert name_transfers(known, hybrid_plan(graph), graph) is known

    def test_message_that_arrives_in_the_next_step(self) -> None:
        graph = small_graph()
        known, bare = self.measured()
        late = max(
            range(len(bare.spans)), key=lambda i: (bare.spans[i].step == 0) * (">" in bare.spans[i].lane) * i
        )
        moved = list(bare.spans)
        moved[late] = moved[late].model_copy(update={"step": 1})
        told = name_transfers(bare.model_copy(update={"spans": tuple(moved)}), hybrid_plan(graph), graph)
        assert told == known

    def test_half_a_step_names_payloads_only(self) -> None:
        graph = small_graph()
        known, bare = self.measured(drop=1)
        named = name_transfers(bare, hybrid_plan(graph), graph)
        lane = play(hybrid_plan(graph), graph, default_cluster(), noise=0.1, steps=2).spans[0].lane
        pairs = [(t, k) for t, k in zip(named.spans, known.spans, strict=True) if t.action != k.action]
        assert pairs
        for told, was in pairs:
            assert (was.lane, was.step) == (lane, 0)
            assert told.action.split()[0] == was.action.split()[1]

    def test_gradient_sums_and_strangers(self) -> None:
        graph = small_graph()
        spans = (
            span("end-1>end-2", "transfer", 0, 1, action="1B"),
            span("edge>cloud", "transfer", 0, 1, action="1B"),
        )
        named = name_transfers(timeline(origin="measured", spans=spans), hybrid_plan(graph), graph)
        assert [s.kind for s in named.spans] == ["reduce", "transfer"]


class TestParts:
    def test_axis_ticks_are_round_and_cover(self) -> None:
        for low, high in ((0, 1), (0.13, 2.42), (1e-7, 3e-6), (-4, 900), (5, 5), (0, 0)):
            found = axis(low, high, 5)
            assert found.low <= low <= high <= found.high
            assert 2 <= len(found.ticks) <= 12
            assert len({found.label(t) for t in found.ticks}) == len(found.ticks)

    def test_whole_axis(self) -> None:
        assert axis(0, 2, 5, whole=True, tight=True).ticks == (0, 1, 2)
        assert axis(0, 8, 5, whole=True, tight=True).at(4) == 0.5

    def test_time_unit(self) -> None:
        assert [time_unit(t)[1] for t in (9, 0.5, 1e-4)] == ["s", "ms", "µs"]

    def test_buckets_keep_extremes_and_every_point(self) -> None:
        points = [(float(i), float(i % 7)) for i in range(2000)]
        found = buckets(points, 240)
        assert len(found) == 240
        assert (min(b.low for b in found), max(b.high for b in found)) == (0.0, 6.0)
        assert buckets(points[:3])[1].mean == 1.0

    def test_elements_escape(self) -> None:
        assert el("b", '<"&', title='"<') == '<b title="&quot;&lt;">&lt;&quot;&amp;</b>'
        assert el("meta", charset="x") == '<meta charset="x">'
        assert (
            el("p", None, Markup("<i></i>"), class_="a", data_x=1.50, id=None)
            == '<p class="a" data-x="1.5"><i></i></p>'
        )
        assert isinstance(join("a", Markup("<b>")), Markup)

    def test_fit(self) -> None:
        assert fit("short", 100) == "short"
        assert fit("a very long name", 60).endswith("…")
        assert fit("name", 5) == ""


class TestText:
    def test_describe_plan(self) -> None:
        graph = small_graph()
        told = describe_plan(hybrid_plan(graph), graph)
        lines = told.splitlines()
        assert lines[0].startswith("hpp: 3 stages on 4 devices, 12 x 8 = 96 rows a step")
        assert "stage 0  layers 0-2   features.0 .. features.2  end-1 x 5, end-2 x 3  warm-up 5" in lines[1]
        assert "sends 96.0 KiB a row" in lines[1]
        assert lines[3].endswith("ends in the loss")
        assert lines[4] == "  sum of gradients of layers 0-2 over end-1, end-2"

    def test_describe_device_that_only_reads(self) -> None:
        graph = small_graph()
        plan = single_plan(graph, "cloud")
        source = plan.sources[0].model_copy(update={"device": "end-1"})
        told = describe_plan(plan.model_copy(update={"sources": (source,), "schedule": "gpipe"}), graph)
        assert told.splitlines()[-1] == "  end-1: reads data only"
        assert "1 stage on 2 devices" in told
        assert "all forwards first" in told

    def test_describe_a_server(self) -> None:
        graph = small_graph()
        plan = server_plan(
            graph, {"a": 3, "b": 5}, served(["a", "b"], Cuts((2, len(graph)), (1, len(graph))))
        )
        lines = describe_plan(plan, graph).splitlines()
        assert lines[0].startswith("test: 3 stages on 3 devices")
        assert lines[1].startswith(f"  stages 0-2  layers 0-{len(graph) - 1}  ")
        assert lines[2] == (
            f"  s updates layers 0-{len(graph) - 1} for a, b: gradients in 2 segments, parameters in 2, "
            "after all gradients are in"
        )
        spans = [
            span("a", "forward", 0, 1), span("a>s", "push", 1, 2, action="push y0.1 to s #2 400B"),
            span("s", "update", 2, 3, action="update y0.1 400B"), span("s>a", "pull", 3, 4, action="pull"),
        ]  # fmt: skip
        view = step_view(timeline(spans=tuple(spans)))
        assert view is not None
        assert {lane: bars[0].style for lane, bars in view.lanes.items()} == {
            "a": "fwd", "a>s": "red", "s": "upd", "s>a": "act",
        }  # fmt: skip

    def test_describe_layers_that_run_again(self) -> None:
        graph = small_graph()
        plan = hybrid_plan(graph)
        first, *others = plan.stages
        for ranges, words in (
            (((0, 2), (2, 3)), "warm-up 5, recomputes in 2 parts"),
            (((0, 1), (1, 2)), "warm-up 5, recomputes layers 0-1 in 2 parts"),
            (((0, 1), (2, 3)), "warm-up 5, recomputes layers 0, 2 in 2 parts"),
            (((2, 3),), "warm-up 5, recomputes layers 2 in 1 part"),
        ):
            stages = (first.model_copy(update={"recompute": ranges}), *others)
            again = plan.model_copy(update={"stages": stages})
            assert f"{words}  " in describe_plan(again, graph).splitlines()[1]
            assert str(stage_map(graph, again, None)).count("recomputes") == 1
        assert "recomputes" not in describe_plan(plan, graph)

    def test_plan_table(self) -> None:
        rows = [
            {"strategy": "single", "step_time_s": 2.0, "throughput_samples_per_s": 48.0, "speedup": 1.0,
             "stages": 1, "micro_batches": 4, "micro_batch_rows": 16, "bottleneck": "cloud",
             "devices": {"cloud": {"peak_memory_bytes": 2**20}}, "chosen": True},
            {"strategy": "[red]gpipe", "error": "no memory"},
            {"strategy": "hpp"},
        ]  # fmt: skip
        console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(plan_table(rows))
        text = console.export_text()
        for words in ("2 s", "1.00x", "4 x 16", "cloud 1.0 MiB", "[red]gpipe", "no memory", "hpp"):
            assert words in text


def test_reporting_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, spanwise.reporting; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_play_gives_both_origins() -> None:
    graph = small_graph()
    assert play(hybrid_plan(graph), graph, default_cluster()).origin == "simulated"
