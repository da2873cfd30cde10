"""Which checkpoints go."""

from hypothesis import given
from hypothesis import strategies as st

from dtrain.checkpoint.retention import Candidate, surplus
from dtrain.spec.job import Keep

CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 1000), st.none() | st.floats(0, 100)), unique_by=lambda c: c.step, max_size=30
)


def gone(losses, last=2, best=1):
    return surplus([Candidate(10 * i, loss) for i, loss in enumerate(losses, 1)], Keep(last=last, best=best))


def test_the_newest_and_the_best_stay():
    assert gone([3.0, 1.0, 2.0, 2.5, 2.6]) == [10, 30]
    assert gone([3.0, 1.0, 2.0, 2.5, 2.6], last=1, best=2) == [10, 40]
    assert gone([3.0, 1.0, 2.0, 2.5, 2.6], best=0) == [10, 20, 30]
    assert gone([3.0, 2.0, 1.0], last=3) == []
    assert gone([]) == []


def test_of_equals_the_newer_is_better():
    assert gone([1.0, 1.0, 2.0, 2.0], last=1) == [10, 30]


def test_what_was_never_measured_is_not_best():
    assert gone([None, 5.0, None, None], last=1) == [10, 30]
    assert gone([None, None, None], last=1, best=5) == [10, 20]


def test_a_loss_that_is_no_number_is_not_best():
    assert gone([float("nan"), 5.0, 6.0, 7.0], last=1) == [10, 30]


@given(CANDIDATES, st.integers(1, 10), st.integers(0, 10))
def test_whatever_there_is(candidates, last, best):
    deleted = surplus(candidates, Keep(last=last, best=best))
    steps = sorted(c.step for c in candidates)
    kept = [s for s in steps if s not in deleted]
    assert deleted == sorted(set(deleted))
    assert set(steps[-last:]) <= set(kept)
    assert len(kept) <= last + best
    measured = [c.loss for c in candidates if c.loss is not None]
    if measured and best:
        assert min(measured) in [c.loss for c in candidates if c.step in kept]
    # What is left is what is kept: asking again changes nothing.
    assert surplus([c for c in candidates if c.step in kept], Keep(last=last, best=best)) == []
