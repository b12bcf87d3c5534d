from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nouns import NOUNS, actions, faults, programs

from spanwise.core.errors import InputError, PlanError
from spanwise.core.faults import Fault
from spanwise.core.noun import Noun
from spanwise.core.program import Action, Program, ProgramFile, parse_actions

small = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NOUNS)
def test_files_hold_the_whole_value(name: str) -> None:
    @small
    @given(NOUNS[name])
    def check(value: Noun) -> None:
        for again in (type(value).from_json(value.to_json()), type(value).from_toml(value.to_toml())):
            assert again == value
            assert again.digest == value.digest
            assert again.to_json() == value.to_json()

    check()


@small
@given(actions)
def test_an_action_survives_as_text(action: Action) -> None:
    assert Action.parse(str(action)) == action


@small
@given(programs)
def test_a_program_survives_as_text_and_as_file(program: Program) -> None:
    assert parse_actions(str(program)) == program.devices
    assert ProgramFile.of(program).program() == program


@small
@given(faults())
def test_a_fault_survives_as_text(fault: Fault) -> None:
    assert Fault.of(str(fault)) == fault


@small
@given(st.text())
def test_any_text_is_an_action_in_its_own_words_or_refused(text: str) -> None:
    try:
        action = Action.parse(text)
    except PlanError:
        pass
    else:
        assert str(action) == text


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def spoilt(data: Any, draw: Any) -> Any:
    """The data with something else in one place, however deep."""
    if isinstance(data, dict) and data and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(data)))
        return {**data, key: spoilt(data[key], draw)}
    if isinstance(data, list) and data and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(data) - 1))
        return [*data[:at], spoilt(data[at], draw), *data[at + 1 :]]
    return draw(junk)


HUMAN: dict[str, dict[str, Any]] = {
    "Cluster": {
        "devices": [{"id": "a", "memory": "1 GiB", "up": 1, "down": "1 MB/s"}, {"id": "b"}],
        "links": [{"between": ["a", "b"], "up": 1, "down": 2}, {"from": "site", "to": "a", "bandwidth": 1}],
        "data": {"a": 1},
    },
    "Job": {"model": {"name": "a:b", "width": 1}, "data": "a:b", "optimizer": {"name": "SGD", "lr": 1}},
}


@pytest.mark.parametrize("name", NOUNS)
def test_spoilt_data_is_a_value_or_an_input_error_in_one_line(name: str) -> None:
    @small
    @given(NOUNS[name], st.data())
    def check(value: Noun, data: st.DataObject) -> None:
        whole = st.sampled_from([value.to_data(), HUMAN.get(name, value.to_data())])
        try:
            type(value).parse(spoilt(data.draw(whole), data.draw), "file.toml")
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 - any other error is a failure
            assert str(error).startswith("file.toml")  # noqa: PT017

    check()
