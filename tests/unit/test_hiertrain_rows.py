"""HierTrain's formulas, rows and search against exhaustive search and a solver of integer programmes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hiertrain_cases import (
    ample,
    exhaustive,
    families,
    layouts,
    no_limit,
    programme_s,
    random_instance,
    random_layout,
)
from spanwise.core.errors import InputError
from spanwise.planner.hiertrain.grow import grown, widened
from spanwise.planner.hiertrain.layout import Instance, Layout, Roles
from spanwise.planner.hiertrain.model import Form, step_time_s, terms
from spanwise.planner.hiertrain.rows import Room, best_rows
from spanwise.planner.hiertrain.search import Candidate, Numbers, Search

FORMS: tuple[Form, ...] = ("event", "barrier")


def best(inst: Instance, form: Form = "event", helpers: int = 2) -> Candidate:
    return Search(inst, no_limit(inst), form).best(families(inst, helpers))[0]


@pytest.mark.parametrize("form", FORMS)
def test_search_is_exhaustive_search_on_small_instances(form: Form) -> None:
    """200 instances: all orders, cuts and integer rows, by the method's formulas written down anew."""
    r = random.Random(0)
    wrong = 0
    for seed in range(200):
        inst = random_instance(seed, r.randint(1, 3), r.randint(1, 5), server=seed % 2 == 0)
        found = best(inst, form)
        again = step_time_s(inst, found.layout, found.rows, form=form)
        assert again == found.price_s
        wrong += abs(found.price_s / exhaustive(inst, form) - 1) > 1e-12
    assert wrong == 0


def test_rows_are_those_of_an_integer_programme() -> None:
    """5 layers, a batch of 128: 24 layouts of three machines, in both forms."""
    for seed in range(4):
        inst = random_instance(seed, 5, 128)
        chosen = [layout for layout in layouts(inst) if len(layout.cuts) == 2 and layout.roles.starts]
        for layout, form in product(random.Random(seed).sample(chosen, 3), FORMS):
            formula, room = terms(inst, layout, form=form), ample(3, 128)
            found = best_rows(formula, 128, room)
            assert found is not None
            assert found.seconds == pytest.approx(programme_s(formula, 128, room), rel=1e-9)


def test_no_layout_has_an_integer_programme_with_a_shorter_step() -> None:
    inst = random_instance(1, 3, 128)
    found = best(inst)
    prices = []
    for layout in layouts(inst):
        count, starts = 1 + len(layout.cuts), layout.roles.starts
        prices.append(programme_s(terms(inst, layout), 128, ample(count, 128, starts=starts)))
    assert min(prices) == pytest.approx(found.price_s, rel=1e-9)


def test_rows_keep_to_memory_and_are_the_best_that_do() -> None:
    r = random.Random(5)
    bound = 0
    for seed in range(60):
        inst = random_instance(seed, 3, 12)
        layout = r.choice([x for x in layouts(inst) if len(x.cuts) == 2 and x.roles.starts])
        falling = sorted((r.uniform(0, 3) for _ in range(3)), reverse=True)
        room = Room(
            (1, 1, 1), tuple(r.randint(1, 12) for _ in range(3)), tuple(falling), r.uniform(4, 40)
        )  # fmt: skip
        formula = terms(inst, layout)
        allowed = [
            formula.seconds((12 - y - z, y, z))
            for y, z in product(range(1, room.upper[1] + 1), range(1, room.upper[2] + 1))
            if 1 <= 12 - y - z <= room.upper[0]
            and falling[0] * (12 - y - z) + falling[1] * y + falling[2] * z <= room.most
        ]
        found = best_rows(formula, 12, room)
        assert (found is None) == (not allowed)
        if found is not None:
            assert found.seconds == pytest.approx(min(allowed), rel=1e-12)
            free = best_rows(formula, 12, ample(3, 12))
            assert free is not None
            bound += found.seconds > free.seconds
    assert bound > 20  # the case is one


def test_the_bound_is_one() -> None:
    """In closed form, below the best rows of every layout, for one micro-batch and more."""
    near: list[float] = []
    for seed in range(6):
        inst = random_instance(seed, 3, 16, machines=4)
        search = Search(inst, no_limit(inst))
        for family in families(inst, 3)[::7]:
            for count in (1, 2, 4):
                seconds = family.seconds(16 // count, count)
                for cuts, least in list(zip(family.cuts, seconds, strict=True))[::3]:
                    layout = Layout(family.roles, tuple(int(m) for m in cuts))
                    found = search.solve(layout, count)
                    if found is not None:
                        assert least <= found.price_s * (1 + 1e-12)
                        near.append(float(least) / found.price_s)
    assert np.mean(near) > 0.7


def test_the_floor_is_weighed_against_the_rest() -> None:
    """Where nobody with data computes, the step is no shorter than raw rows take: still the best rows."""
    bound = 0
    for seed in range(40):
        inst = replace(random_instance(seed, 4, 40), sources=(3,))
        layout = Layout(Roles(2, (1, 0)), (2, 4))
        slow = tuple(
            replace(m, input_loads=((f"{i}", seed * 4e-3 * (1 + i)),)) for i, m in enumerate(inst.machines)
        )
        formula = terms(replace(inst, machines=slow), layout)
        found = best_rows(formula, 40, ample(3, 40))
        assert found is not None
        every = [(40 - y - z, y, z) for y in range(1, 39) for z in range(1, 40 - y)]
        least = min(formula.seconds(rows) for rows in every)
        assert found.seconds == pytest.approx(least, rel=1e-12)
        bound += found.seconds > formula.moving_s(found.rows)
    assert 5 < bound < 40


def test_waiting_for_nobody_is_never_slower() -> None:
    """On the same layout and rows the event form is at most the barrier form, and at times below it."""
    ratios: list[float] = []
    for seed in range(100):
        inst = random_instance(seed, 5, 16)
        layout, rows = random_layout(seed, 5, 16)
        event, barrier = (step_time_s(inst, layout, rows, form=form) for form in FORMS)
        ratios.append(barrier / event)
    assert min(ratios) >= 1 - 1e-12
    assert max(ratios) > 1.02


def test_a_plan_for_fifty_layers_is_little_work() -> None:
    """Counted, not timed: of some 15,000 layouts the rows of few are worked out."""
    inst = random_instance(3, 50, 128)
    search = Search(inst, no_limit(inst))
    listed = families(inst)
    assert sum(len(family.cuts) for family in listed) > 14_000
    assert search.best(listed)
    assert search.solved < 500


def test_four_machines_against_exhaustive_search() -> None:
    """All layouts and rows of four machines; rows of four are worked out in turns, which is not exact."""
    gaps: list[float] = []
    for seed in range(8):
        inst = random_instance(seed, 2, 6, machines=4)
        found = best(inst, helpers=3)
        least = float("inf")
        for layout in layouts(inst, 3):
            formula, count = terms(inst, layout), 1 + len(layout.cuts)
            for rows in product(range(7), repeat=count):
                if sum(rows) == 6 and all(rows[1:]) and bool(rows[0]) == layout.roles.starts:
                    least = min(least, formula.seconds(rows))
        gaps.append(found.price_s / least - 1)
    assert min(gaps) >= -1e-12
    assert max(gaps) < 1e-2


def test_single_changes_come_near_the_best_of_all_layouts() -> None:
    """5 machines, 6 layers: the bound where changes end, over the least bound of all layouts."""
    gaps: list[float] = []
    for seed in range(8):
        inst = random_instance(seed, 6, 64, machines=5)
        least = min(float(family.seconds(64, 1).min()) for family in families(inst, 4))
        numbers, grid = Numbers.of(inst), range(1, 7)
        few = min(float(family.seconds(64, 1).min()) for family in families(inst))
        ends = [grown(numbers, start, grid, 1) for start in widened(numbers, grid, 1, 16)]
        gaps.append(min(few, *(value for end in ends for value in end.values())) / least - 1)
    assert min(gaps) >= -1e-12
    assert np.mean(gaps) < 0.02


def test_equal_machines_without_links_to_speak_of_are_three_times_as_fast() -> None:
    inst = random_instance(0, 6, 99)
    fast = {pair: replace(route, bandwidth_bytes_per_s=1e15) for pair, route in inst.routes.items()}
    alike = replace(inst.machines[0], update_s_per_byte=0.0)
    routes = {pair: replace(r, resources=((f"{pair}", 1e15),)) for pair, r in fast.items()}
    equal = replace(inst, machines=(alike,) * 3, routes=routes)
    alone = step_time_s(equal, Layout(Roles(0)), (99,))
    assert alone / best(equal).price_s == pytest.approx(3.0, rel=1e-3)


def test_one_machine_alone_takes_what_its_layers_take() -> None:
    inst = random_instance(2, 4, 8)
    for w, machine in enumerate(inst.machines):
        own = machine.input_s + machine.forward_s[-1] + machine.backward_s[-1]
        update = machine.update_s_per_byte * inst.parameters[0, 4]
        for form in FORMS:
            assert step_time_s(inst, Layout(Roles(w)), (8,), form=form) == pytest.approx(8 * own + update)


def test_a_machine_that_stands_still_gets_no_rows() -> None:
    inst = random_instance(4, 4, 16)
    slow = replace(
        inst.machines[2],
        forward_s=tuple(1e6 * (1 + i) for i in range(5)),
        backward_s=tuple(1e6 * (1 + i) for i in range(5)),
    )
    found = best(replace(inst, machines=(*inst.machines[:2], slow)))
    assert 2 not in (found.layout.roles.finisher, *found.layout.roles.workers)


def test_a_machine_without_links_is_not_used() -> None:
    inst = random_instance(4, 4, 16)
    near = {pair: route for pair, route in inst.routes.items() if 2 not in pair}
    lonely = replace(inst.machines[2], input_loads=(("no link", float("inf")),))
    found = best(replace(inst, machines=(*inst.machines[:2], lonely), routes=near))
    assert 2 not in (found.layout.roles.finisher, *found.layout.roles.workers)


@pytest.mark.parametrize("seed", range(4))
def test_other_names_give_the_plan_other_names(seed: int) -> None:
    inst = random_instance(seed, 4, 16)
    to = (1, 2, 0)  # machine i is now called to[i]
    names = {to[a]: a for a in range(3)}
    machines = tuple(inst.machines[names[i]] for i in range(3))
    routes = {(to[a], to[b]): route for (a, b), route in inst.routes.items()}
    found, other = best(inst), best(replace(inst, machines=machines, routes=routes))
    assert other.price_s == pytest.approx(found.price_s, rel=1e-12)
    assert other.layout.roles.finisher == to[found.layout.roles.finisher]
    assert other.rows == found.rows


def test_nothing_that_gets_faster_makes_the_step_longer() -> None:
    r = random.Random(1)
    for seed in range(10):
        inst = random_instance(seed, 3, 16)
        before = best(inst).price_s
        pair = r.choice(list(inst.routes))
        rate = 3 * inst.routes[pair].bandwidth_bytes_per_s
        quick = replace(inst.routes[pair], bandwidth_bytes_per_s=rate, resources=((f"{pair}", rate),))
        assert best(replace(inst, routes={**inst.routes, pair: quick})).price_s <= before * (1 + 1e-12)
        w = r.randrange(3)
        faster = replace(inst.machines[w], forward_s=tuple(x / 2 for x in inst.machines[w].forward_s))
        machines = tuple(faster if i == w else m for i, m in enumerate(inst.machines))
        assert best(replace(inst, machines=machines)).price_s <= before * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_no_baseline_has_a_shorter_step(seed: int) -> None:
    """By formula, on every random instance: one machine, one cut, one helper, equal rows on all."""
    inst = random_instance(seed, 4, 24)
    least = best(inst).price_s
    alone = [step_time_s(inst, Layout(Roles(w)), (24,)) for w in range(3)]
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    split = [
        step_time_s(inst, Layout(Roles(o, (w,), starts=False), (m,)), (0, 24))
        for o, w in pairs
        for m in range(1, 4)
    ]
    two = [
        step_time_s(inst, Layout(Roles(o, (w,)), (m,)), (24 - y, y))
        for o, w in pairs
        for m in range(1, 5)
        for y in range(1, 24)
    ]
    equal = step_time_s(inst, Layout(Roles(0, (1, 2)), (4, 4)), (8, 8, 8))
    assert least <= min(*alone, *split, *two, equal) * (1 + 1e-12)


def test_bad_numbers_are_refused() -> None:
    """No layers, machines or rows; times and sizes that are negative, not numbers, or of another model."""
    inst = random_instance(0, 3, 8)
    first, *rest = inst.machines
    empty = replace(first, forward_s=(0.0,), backward_s=(0.0,), forward_once_s=(0.0,), backward_once_s=(0.0,))
    none = {"out_bytes": (0.0,), "back_bytes": (0.0,), "parameters": np.zeros((1, 1)), "machines": (empty,)}
    cases: list[tuple[dict[str, object], str]] = [
        (none, "0 layers, 1 machines and 8 rows; there must be at least one of each"),
        ({"machines": ()}, "3 layers, 0 machines and 8 rows"),
        ({"rows": 0}, "3 layers, 3 machines and 0 rows"),
        (
            {"out_bytes": (0.0, 1.0, -2.0, 0.0)},
            "outputs of 3 layers, the least -2 bytes; sizes must be known",
        ),
        ({"back_bytes": (0.0, 1.0, np.nan, 0.0)}, "gradients of 3 layers, the least nan bytes"),
        ({"back_bytes": (0.0, 1.0, 0.0)}, "gradients of 2 layers, .* known of all 3, finite"),
        ({"parameters": np.full((4, 4), np.inf)}, "parameters of 3 layers, the least inf bytes"),
    ]
    for key in ("forward_s", "backward_s", "forward_once_s", "backward_once_s"):
        what = key.removesuffix("_s").replace("_", " ")
        for times, words in (
            (
                (0.0, 1.0, 0.5, 2.0),
                "takes -0.5 s for layer 1; times must be finite and not negative, profile",
            ),
            ((0.0, np.nan, 2.0, 3.0), "takes nan s for layer 0"),
            ((0.0, 1.0, 2.0, np.inf), "takes inf s for layer 2"),
            ((0.0, 1.0, 2.0), "has 2 layers of 3"),
        ):
            bad = replace(first, **{key: times})
            cases.append(({"machines": (*rest, bad)}, f"{what} of machine 2 {words}"))
    cases += [
        ({"machines": (replace(first, update_s_per_byte=s),)}, "machine 0 updates a byte in")
        for s in (-1e-9, np.nan, np.inf)
    ]
    for changes, words in cases:
        with pytest.raises(InputError, match=f"^hiertrain: {words}"):
            replace(inst, **changes)
    assert replace(inst).layers == 3  # control: the same numbers unchanged
