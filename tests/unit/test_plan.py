from __future__ import annotations

import pytest

from plan_cases import chain, plan, replicas, stage
from spanwise.core.errors import InputError, PlanError
from spanwise.core.plan import Plan, Stage, Sync, row_ranges

GRAPH = chain(4)


def test_rows_are_assigned_consecutively() -> None:
    assert row_ranges(replicas("a:3 b:1 c:4")) == (("a", 0, 3), ("b", 3, 4), ("c", 4, 8))
    one = stage(0, 2, "b:5 a:3")
    assert (one.devices, one.rows, one.row_ranges()) == (("b", "a"), 8, (("b", 0, 5), ("a", 5, 8)))


def test_batch_and_devices() -> None:
    found = plan(GRAPH, stage(0, 2, "a:3 b:5"), stage(2, 4, "c:8"), sources="d:2 c:6", micro_batches=3)
    assert found.batch == 24
    assert found.devices == ("a", "b", "c", "d")


@pytest.mark.parametrize("stages", [(stage(1, 4, "a:8"),), (stage(0, 2, "a:8"), stage(3, 4, "b:8")),
                                    (stage(0, 3, "a:8"), stage(2, 4, "b:8"))])  # fmt: skip
def test_stages_cover_the_layers_in_order(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(InputError, match="stages must cover the layers in order"):
        checked(stages)


def checked(stages: tuple[Stage, ...], sources: str = "a:8", rows: int = 8) -> Plan:
    return Plan.parse(
        {
            "strategy": "test", "graph_digest": "0", "micro_batches": 2, "micro_batch_rows": rows,
            "sources": replicas(sources), "stages": stages,
        }
    )  # fmt: skip


def test_rows_add_up_in_every_stage_and_over_the_sources() -> None:
    with pytest.raises(InputError, match="stage 1 computes 7 rows of a micro-batch of 8"):
        checked((stage(0, 2, "a:8"), stage(2, 4, "b:7")))
    with pytest.raises(InputError, match="sources hold 9 rows of a micro-batch of 8"):
        checked((stage(0, 4, "a:8"),), sources="a:4 b:5")


def test_warm_up_must_not_rise() -> None:
    with pytest.raises(InputError, match=r"rises from 1 \(layers \[0:2\)\) to 2"):
        checked((stage(0, 2, "a:8", 1), stage(2, 4, "b:8", 2)))
    rising = (stage(0, 2, "a:8", 1), stage(2, 4, "b:8", 2))
    assert plan(GRAPH, *rising, schedule="gpipe").schedule == "gpipe"  # where warm-up means nothing


def test_a_stage_has_layers_and_distinct_devices() -> None:
    data = {"start": 2, "stop": 2, "replicas": [{"device": "a", "rows": 1}]}
    with pytest.raises(InputError, match=r"\[2:2\) is empty"):
        Stage.parse(data)
    with pytest.raises(InputError, match="lists a device twice: a, b, a"):
        Stage.parse({"start": 0, "stop": 2, "replicas": replicas("a:1 b:2 a:1")})


@pytest.mark.parametrize("ranges", [[[1, 3]], [[2, 3], [4, 7]], [[2, 4], [3, 5]], [[4, 5], [2, 3]], [[3, 3]]])
def test_layers_that_run_again_lie_in_the_stage_in_order(ranges: list[list[int]]) -> None:
    data = {"start": 2, "stop": 6, "replicas": replicas("a:1")}
    assert Stage.parse(data | {"recompute": [[2, 4], [4, 5]]}).recompute == ((2, 4), (4, 5))
    with pytest.raises(PlanError, match=r"stage \[2:6\) runs layers \[\d:\d\) again; ranges must"):
        Stage.parse(data | {"recompute": ranges})


def test_a_replica_computes_rows() -> None:
    with pytest.raises(InputError, match=r"replicas\.0\.rows"):
        Stage.parse({"start": 0, "stop": 2, "replicas": [{"device": "a", "rows": 0}]})


def test_a_sync_is_over_two_devices() -> None:
    with pytest.raises(InputError, match="devices"):
        Sync.parse({"layers": [[0, 1]], "devices": ["a"]})
    with pytest.raises(InputError, match="segments"):
        Sync.parse({"layers": [[0, 1]], "devices": ["a", "b"], "segments": 0})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"ends": [1, 3]}, r"layers \[0:4\) end at 1, 3; ends must rise and the last must be 4"),
        ({"ends": [2, 2, 4]}, "end at 2, 2, 4"),
        ({"ends": [0, 4]}, "end at 0, 4"),
        ({"ends": []}, "end at none"),
        ({"ends": [2, 4], "segments": 2}, "has both 2 segments and ends of segments; give one"),
    ],
)
def test_a_sum_is_cut_at_layers_that_it_has(more: dict[str, object], why: str) -> None:
    data = {"layers": [[0, 4]], "devices": ["a", "b"]}
    with pytest.raises(PlanError, match=why):
        Sync.parse({**data, **more})
    assert Sync.parse({**data, "ends": [1, 4]}).most_segments == 2
    assert "ends" not in Sync.parse(data).to_data()  # as in plans from before there were any


def test_a_broken_plan_is_an_error_of_its_own_kind_and_names_the_file() -> None:
    data = {"start": 3, "stop": 3, "replicas": [{"device": "a", "rows": 1}]}
    with pytest.raises(PlanError, match=r"^plan: stage"):
        Stage.parse(data)
    with pytest.raises(PlanError, match=r"^mine\.json: plan: stage"):
        Stage.parse(data, "mine.json")
