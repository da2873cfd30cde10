"""Early stopping: it counts what brought nothing, once, and a resumed run decides as it would have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.checkpoint import store
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.spec.job import StopEarly
from dtrain.training.patience import Patience

LOSSES = st.lists(st.one_of(st.floats(-3, 3), st.sampled_from([math.nan, math.inf, 1.0, 0.1])), max_size=30)
SETTINGS = st.builds(StopEarly, patience=st.integers(1, 4), min_delta=st.sampled_from([0.0, 0.05, 1.0]))


def told(losses, settings, every=10):
    patience = Patience(settings)
    for number, loss in enumerate(losses, start=1):
        patience.consider(number * every, loss)
    return patience


def plainly(losses, settings, every=10):
    """The same in a few plain lines: the step after which training ends."""
    best, worse = math.inf, 0
    for number, loss in enumerate(losses, start=1):
        worse = 0 if loss < best - settings.min_delta else worse + 1
        best = loss if worse == 0 else best
        if worse == settings.patience:
            return number * every + 1
    return math.inf


@given(losses=LOSSES, asked=SETTINGS)
def test_it_ends_where_a_plain_count_ends(losses, asked):
    assert told(losses, asked).last_step == plainly(losses, asked)


def test_a_better_loss_begins_the_count_anew():
    asked = StopEarly(patience=2)
    assert told([3.0, 3.1, 2.9, 2.95], asked).last_step == math.inf
    assert told([3.0, 3.1, 2.9, 2.95, 2.9], asked).last_step == 51


def test_a_loss_that_is_better_by_too_little_does_not_count():
    asked = StopEarly(patience=2, min_delta=0.1)
    assert told([1.0, 0.95, 0.91], asked).last_step == 31
    assert told([1.0, 0.95, 0.89], asked).last_step == math.inf
    # Each is little better than the one before, and the last much better than the best that counted.
    assert told([1.0, 0.95, 0.89, 0.85, 0.78], asked).last_step == math.inf


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_never_better(loss):
    assert told([loss, loss], StopEarly(patience=2)).last_step == 21
    assert told([loss, 1.0], StopEarly(patience=2)).last_step == math.inf


def test_a_step_is_counted_once():
    """After a failure the last evaluation is done again."""
    patience = told([1.0, 1.1], StopEarly(patience=2))
    patience.consider(20, 1.1)
    patience.consider(10, 1.1)
    assert patience.last_step == math.inf
    patience.consider(30, 1.1)
    assert patience.last_step == 31


def test_an_end_is_final():
    """An attempt that begins at the end evaluates it, and must neither go on nor change its mind."""
    patience = told([1.0, 1.1], StopEarly(patience=1), every=1)
    assert patience.last_step == 3
    patience.consider(3, 5.0)
    assert patience.last_step == 3
    patience.consider(3, 0.5)
    patience.consider(4, 0.1)
    assert patience.last_step == 3


@settings(deadline=None, max_examples=60)
@given(losses=LOSSES, asked=SETTINGS, cut=st.integers(0, 30), by=st.sampled_from(["snapshot", "checkpoint"]))
def test_a_restored_one_decides_as_it_would_have(losses, asked, cut, by, tmp_path_factory):
    """Bit for bit, whichever way its memory travelled: a loss is compared with the best one to the last digit."""
    folder = tmp_path_factory.mktemp("p")
    whole, before = told(losses, asked), told(losses[:cut], asked)
    after = Patience(asked)
    if by == "snapshot":
        segment = Snapshot.create(folder / "state", before.state, 1)
        segment.write_whole(cut, before.state)
        segment.read_into(after.state)
    else:
        store.write(folder, 1, before.state, {})
        store.read_into(store.path_of(folder, 1), after.state)
    assert after.last_step == before.last_step
    for number, loss in enumerate(losses, start=1):
        after.consider(number * 10, loss)
    assert after.last_step == whole.last_step
    [held], [expected] = after.state, whole.state
    assert held.tensor.numpy().tobytes() == expected.tensor.numpy().tobytes()


def test_steps_as_large_as_a_job_may_have_are_kept_exactly():
    patience = Patience(StopEarly(patience=1))
    patience.consider(999_999_998, 1.0)
    patience.consider(999_999_999, 1.0)
    assert patience.last_step == 10**9
    assert patience.state[0].tensor.dtype == torch.float64
