"""Whether a failure is tried again: a pure function of it, of those before, and of the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.runtime.retry import FINAL, FIRST_DELAY_S, LONGEST_DELAY_S, Failure, decide
from dtrain.spec.job import Retry

AGAIN = ("killed", "hung", "exited", "agent")
ANY = st.sampled_from([*AGAIN, *sorted(FINAL)])


def failures(*steps, kind="killed"):
    return [Failure(kind, f"lost at {step}", step) for step in steps]


@pytest.mark.parametrize("kind", sorted(FINAL))
def test_what_would_fail_again_is_not_tried_again(kind):
    found = decide(Failure(kind, "rank 1, step 7: ValueError: bad", 6), [], Retry())
    assert (found.again, found.delay_s, found.reason) == (False, 0.0, "rank 1, step 7: ValueError: bad")


@pytest.mark.parametrize("kind", AGAIN)
def test_each_class_has_its_own_budget(kind):
    budget = Retry(killed=2, hung=2, exited=2, agent=2)
    others = [Failure(k, "", 10) for k in AGAIN if k != kind for _ in range(2)]
    first, second, third = failures(20, 30, 40, kind=kind)
    assert decide(first, others, budget).again
    assert decide(second, [*others, first], budget).reason == f"{kind} 2 of 2"
    found = decide(third, [*others, first, second], budget)
    assert not found.again
    assert f"retry.{kind} allows 2" in found.reason
    assert "lost at 40" in found.reason


def test_what_a_script_has_saved_is_progress_without_a_step():
    stuck = failures(0, 0, 0, 0)
    assert not decide(stuck[-1], stuck[:-1], Retry()).again
    saved = Failure("killed", "lost", 0, has_saved=True)
    assert decide(saved, stuck, Retry()).delay_s == 0.0
    assert decide(stuck[0], [*stuck, saved], Retry()).delay_s == FIRST_DELAY_S, "a second failure since then"
    assert not decide(stuck[0], [saved, *stuck], Retry()).again, "since when three more have failed"


def test_a_budget_of_none():
    assert not decide(failures(5)[0], [], Retry(killed=0)).again


def test_the_first_retry_waits_for_nothing():
    assert decide(failures(0)[0], [], Retry()).delay_s == 0.0


def test_failures_without_a_new_step_are_counted_whatever_their_class():
    earlier = [Failure("killed", "", 4), Failure("hung", "", 9), Failure("exited", "", 9)]
    assert decide(Failure("agent", "", 10), earlier, Retry()).again  # a new step was done
    found = decide(Failure("agent", "gone", 9), earlier, Retry(without_progress=3))
    assert not found.again
    assert "3 failures without a new step" in found.reason
    assert decide(Failure("agent", "", 9), earlier, Retry(without_progress=4)).again


def test_a_resume_from_further_back_counts_as_no_progress():
    """Steps that were done before and lost again are not new."""
    assert not decide(failures(5)[0], failures(9, 8), Retry(without_progress=3)).again


def test_delays_double_and_are_bounded():
    budget = Retry(killed=1000, without_progress=1000)
    delays = [decide(failures(5)[0], failures(*[5] * n), budget).delay_s for n in range(12)]
    assert delays[:4] == [0.0, FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S


@given(
    kinds=st.lists(st.tuples(ANY, st.integers(0, 20)), min_size=1, max_size=40),
    allowed=st.integers(0, 5),
    without_progress=st.integers(1, 5),
)
def test_every_run_of_failures_ends_within_its_budget(kinds, allowed, without_progress):
    budget = Retry(killed=allowed, hung=allowed, exited=allowed, agent=allowed, without_progress=without_progress)
    earlier = []
    for kind, step in kinds:
        failure = Failure(kind, "x", step)
        found = decide(failure, earlier, budget)
        assert found == decide(failure, list(earlier), budget)
        assert found.reason
        assert 0.0 <= found.delay_s <= LONGEST_DELAY_S
        earlier.append(failure)
        if not found.again:
            return
        assert kind not in FINAL
        same = [f for f in earlier if f.kind == kind]
        assert len(same) <= allowed
    assert len(earlier) <= 4 * allowed
