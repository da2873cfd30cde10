"""Whether ranks are stuck, and which one holds up the others."""

from hypothesis import given
from hypothesis import strategies as st

from dtrain.runtime.watchdog import (
    PHASES,
    SHORTEST_TIMEOUT_S,
    SLOWEST_OF_USUAL,
    Beat,
    Silence,
    culprits,
    is_hung,
    script_timeout,
    takes_any_time,
    timeout,
)
from dtrain.training import loop

BEATS = st.builds(Beat, st.floats(0, 1e6), st.integers(0, 100), st.integers(0, 8), st.integers(0, len(PHASES) - 1))


def test_places_have_the_names_of_the_loop():
    names = dict(zip(PHASES, range(len(PHASES)), strict=True))
    assert names["starting"] == loop.STARTING
    assert names["reading data"] == loop.DATA
    assert names["forward"] == loop.FORWARD
    assert names["backward"] == loop.BACKWARD
    assert names["updating"] == loop.UPDATE
    assert names["snapshot"] == loop.SNAPSHOT
    assert names["evaluating"] == loop.EVALUATE
    assert names["ending"] == loop.END


def test_a_place_is_told_to_people_from_one():
    assert Beat(0.0, 41, 0, loop.DATA).place == "reading data in step 42"
    assert Beat(0.0, 41, 0, loop.FORWARD).place == "in the forward pass of step 42"


def test_the_first_step_gets_the_time_a_start_takes():
    assert timeout(None, 120.0, 900.0) == 900.0


def test_the_usual_pace_shortens_the_wait_within_bounds():
    assert timeout(0.001, 120.0, 900.0) == SHORTEST_TIMEOUT_S
    assert timeout(2.0, 120.0, 900.0) == SLOWEST_OF_USUAL * 2.0
    assert timeout(100.0, 120.0, 900.0) == 120.0
    assert timeout(0.001, 3.0, 900.0) == 3.0  # what was asked for is never exceeded


@given(usual=st.floats(0, 1e9), hang=st.floats(0.1, 1e6), start=st.floats(0.1, 1e6))
def test_no_wait_is_longer_than_asked(usual, hang, start):
    assert 0 < timeout(usual, hang, start) <= hang


def test_compiling_for_evaluation_and_the_last_sample_take_any_time():
    assert takes_any_time([loop.FORWARD, loop.END], is_compiled=False)
    assert takes_any_time([loop.EVALUATE, loop.EVALUATE], is_compiled=True)
    assert not takes_any_time([loop.EVALUATE, loop.EVALUATE], is_compiled=False)
    assert not takes_any_time([loop.DATA, loop.FORWARD, loop.UPDATE], is_compiled=True)


def test_one_lively_rank_is_enough():
    silent, lively = Beat(100.0, 5, 0, 1), Beat(109.0, 5, 0, 2)
    assert not is_hung([silent, lively], 110.0, 5.0)
    assert is_hung([silent, lively], 114.5, 5.0)
    assert not is_hung([lively], 114.0, 5.0)  # just as long is not longer


def test_nobody_is_not_hung():
    assert not is_hung([], 1e9, 1.0)
    assert culprits({}) == []


def test_who_has_come_least_far_holds_up_the_others():
    waiting = Beat(0.0, 7, 1, loop.BACKWARD)
    assert culprits({0: waiting, 1: Beat(0.0, 7, 1, loop.DATA)}) == [1]
    assert culprits({0: waiting, 1: Beat(0.0, 7, 0, loop.UPDATE)}) == [1]
    assert culprits({0: Beat(0.0, 6, 3, loop.END), 1: waiting}) == [0]
    assert culprits({3: waiting, 1: waiting}) == [1, 3]


@given(st.dictionaries(st.integers(0, 7), BEATS, min_size=1), st.floats(0, 2e6), st.floats(0.1, 1e3))
def test_somebody_is_always_to_blame_and_is_known(beats, now, timeout_s):
    blamed = culprits(beats)
    assert blamed == sorted(set(blamed))
    assert blamed
    assert set(blamed) <= set(beats)
    if is_hung(list(beats.values()), now, timeout_s):
        assert all(now - beat.time > timeout_s for beat in beats.values())


def test_a_script_may_be_silent_for_as_long_as_it_ever_was_and_longer():
    assert script_timeout(None, 120.0, 900.0) == 900.0
    assert script_timeout(1.0, 120.0, 900.0) == 120.0
    assert script_timeout(300.0, 120.0, 900.0) == 1500.0, "an evaluation between two reports is not a hang"


def test_the_longest_silence_is_between_two_reports():
    silence = Silence()
    for number, latest in enumerate((None, 10.0, 10.0, 12.0, 40.0, 41.0)):
        silence.hear(latest, number)
    assert (silence.heard, silence.longest_s) == (41.0, 28.0)


def test_reports_between_two_looks_count_as_heard():
    silence = Silence()
    silence.hear(10.0, 1)
    assert silence.longest_s is None
    silence.hear(10.2, 9)
    quick = Silence()
    quick.hear(10.2, 9)
    assert quick.longest_s == 0.0


def test_a_rank_is_stopped_for_as_long_as_every_look_finds_it_so():
    silence = Silence()
    looks = [(True, 1.0), (True, 4.0), (False, 5.0), (True, 6.0), (True, 8.0)]
    assert [silence.stopped_for(*look) for look in looks] == [0.0, 3.0, 0.0, 0.0, 2.0]
