"""The HTML report: whole, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting_run import (
    hybrid_plan,
    play,
    single_plan,
    small_graph,
    wide_cluster,
    wide_plan,
    write_run,
)

from spanwise.core.cluster import Cluster, Device
from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InputError
from spanwise.core.run_folder import RunFolder
from spanwise.reporting import write_report

VOID = {"meta", "br", "hr"}


class Balanced(HTMLParser):
    """Refuses a document whose elements do not nest; collects text, attributes and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def parsed(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_balanced_and_names_everything(tmp_path: Path) -> None:
    page = parsed(write_report(write_run(tmp_path)))
    for device in default_cluster().ids:
        assert page.text.count(device) > 3
    for title in (
        "Cluster",
        "Stages",
        "One training step",
        "Utilisation",
        "Training",
        "Devices",
        "How it was",
    ):
        assert title in page.text
    for words in ("50 Mbit/s", "10 ms", "stage 0 · 5 rows", "warm-up 5", "95.7%", "0.137", "mobilenet_v2"):
        assert words in page.text
    assert "spanwise train job.toml" in page.text
    assert "class_" not in {name for name, _ in page.attributes}


def test_page_loads_nothing(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path))
    page, text = parsed(report), report.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}


def test_predicted_and_measured_share_one_axis(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert text.count("next step starts, predicted") == text.count("next step starts, measured") == 1
    assert text.count(">predicted</text>") == text.count(">measured</text>") == 4 + 1  # devices, legend
    assert text.count("<title>forward s1 m11 [0:8)\n") == 2
    assert "shorter than measured" in text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>&\"'"
    graph = small_graph(name=evil, layer_name=evil)
    cluster = default_cluster().model_copy(update={"description": evil})
    folder = write_run(tmp_path, graph=graph, cluster=cluster, plan=hybrid_plan(graph), name=evil)
    folder.write_json(folder.env, {evil: {evil: [evil]}})
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    folder.write_json(folder.summary, {**summary, "strategy": evil})
    page = parsed(write_report(folder))
    assert "img" not in page.tags
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert evil in page.text


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (("simulated",), ("There is no predicted timeline", "shorter than measured")),
        (("simulated", "summary"), ("There is no predicted timeline", "not predicted")),
        (("measured",), ("There is no measured timeline", "predicted")),
        (("simulated", "measured", "summary"), ("no timeline with spans", "neither predicted nor measured")),
        (("metrics",), ("no metrics.jsonl",)),
        (("metrics", "summary"), ("not evaluated", "no step trained")),
        (("cluster",), ("no cluster.json",)),
        (("graph",), ("no graph.json",)),
        (("plan",), ("no plan.json",)),
        (("profile",), ("forward and backward FLOPs",)),
        (("env",), ("no env.json",)),
        (
            ("simulated", "measured", "summary", "metrics", "cluster", "graph", "plan", "profile", "env"),
            ("no cluster.json", "no graph.json", "names a device", "No timeline says", "no plan"),
        ),
    ],
)
def test_missing_pieces_are_said(tmp_path: Path, gone: tuple[str, ...], words: tuple[str, ...]) -> None:
    folder = write_run(tmp_path)
    for name in gone:
        getattr(folder, name).unlink()
    page = parsed(write_report(folder))
    for expected in words:
        assert expected in page.text


def test_complete_run_says_nothing_is_missing(tmp_path: Path) -> None:
    page = parsed(write_report(write_run(tmp_path)))
    assert ("class", "missing") not in page.attributes


def test_no_job_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"job\.json"):
        write_report(RunFolder(tmp_path))


@pytest.mark.parametrize("name", ["summary", "env", "metrics", "measured"])
def test_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path)
    path: Path = getattr(folder, name)
    path.write_text('{"a": }\n', encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(path.name)) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)


def test_plan_of_another_graph_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    graph = small_graph()
    shorter = (*graph.layers[:-2], graph.layers[-1].model_copy(update={"ops": graph.layers[-2].ops}))
    graph.model_copy(update={"layers": shorter}).save(folder.graph)
    with pytest.raises(InputError, match=r"covers 17 layers, but graph\.json has 16"):
        write_report(folder)


def test_one_device(tmp_path: Path) -> None:
    cluster = Cluster(name="solo", devices=(default_cluster().device("cloud"),))
    graph = small_graph()
    folder = write_run(tmp_path, cluster=cluster, plan=single_plan(graph, "cloud"), steps=1, epochs=1)
    page = parsed(write_report(folder))
    assert "1 device" in page.text
    assert "1 step, 1 evaluation." in page.text


def test_idle_device_is_shown_as_not_used(tmp_path: Path) -> None:
    graph = small_graph()
    page = parsed(write_report(write_run(tmp_path, graph=graph, plan=single_plan(graph, "cloud"))))
    assert page.words.count("not used") == 3


def test_many_devices_and_a_long_run_stay_small(tmp_path: Path) -> None:
    cluster, graph = wide_cluster(), small_graph()
    folder = write_run(tmp_path, cluster=cluster, plan=wide_plan(graph, cluster), steps=2000, epochs=10)
    report = write_report(folder)
    page = parsed(report)
    assert report.stat().st_size < 1_500_000
    assert all(device in page.text for device in cluster.ids)
    assert "link lanes with less traffic are left out" in page.text
    longest = max(len(value or "") for name, value in page.attributes if name == "points")
    assert longest < 240 * 2 * 14  # a polygon of 240 points there and back


def test_device_in_several_stages_and_without_spans(tmp_path: Path) -> None:
    graph = small_graph()
    plan = hybrid_plan(graph)
    stages = (*plan.stages[:2], plan.stages[2].model_copy(update={"replicas": plan.stages[1].replicas}))
    folder = write_run(
        tmp_path, graph=graph, plan=plan.model_copy(update={"stages": stages, "syncs": plan.syncs})
    )
    assert "stages 1, 2" in parsed(write_report(folder)).text


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, steps=3, epochs=1)
    folder.metrics.write_text(
        '{"event": "step", "step": 1, "loss": 2.0}\n{"event": "step", "step": 2, "loss": NaN}\n'
        '{"event": "epoch", "epoch": 1, "step": 2, "accuracy": null}\n{"event": "other"}\n',
        encoding="utf-8",
    )
    page = parsed(write_report(folder))
    assert not any(
        "nan" in (value or "") for name, value in page.attributes if name in ("points", "cx", "cy")
    )


def test_links_below_the_boxes(tmp_path: Path) -> None:
    devices = tuple(Device(id=f"d{i}", site=f"s{i}") for i in range(3))
    links = [{"between": ["s0", "s2"], "up": "8 Mbit/s", "down": "2 Mbit/s", "latency": "3 ms"}]
    cluster = Cluster.parse({"devices": [d.to_data() for d in devices], "links": links})
    graph = small_graph()
    folder = write_run(tmp_path, graph=graph, cluster=cluster, plan=single_plan(graph, "d0"))
    assert "s0 – s2: → 8 Mbit/s, ← 2 Mbit/s · 3 ms" in parsed(write_report(folder)).text


def test_report_is_the_same_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert folder.report.name == "report.html"


def test_fixture_is_a_fair_prediction() -> None:
    graph = small_graph()
    calm, noisy = (play(hybrid_plan(graph), graph, default_cluster(), noise=n) for n in (0.0, 0.12))
    assert calm.step_time_s < noisy.step_time_s < 1.12 * calm.step_time_s
