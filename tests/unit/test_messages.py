"""Messages between the processes of a node: each whole, or not at all."""

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.messages import MAX_BYTES, pair, receive, send

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture
def channel():
    ours, theirs = pair()
    with ours, theirs:
        yield ours, theirs


@given(message=st.dictionaries(st.text(max_size=10), VALUES, max_size=5))
def test_what_is_sent_arrives(message):
    ours, theirs = pair()
    with ours, theirs:
        assert send(ours, message)
        assert receive(theirs) == message


def test_each_message_is_one(channel):
    ours, theirs = channel
    for number in range(20):
        assert send(ours, {"n": number, "text": "x" * number * 100})
    assert [receive(theirs)["n"] for _ in range(20)] == list(range(20))


@pytest.mark.parametrize(
    "text", ["x" * 10 * MAX_BYTES, "ä" * MAX_BYTES, "\x00" * MAX_BYTES, "\U0001f600" * MAX_BYTES, '"\\' * MAX_BYTES]
)
def test_a_text_too_long_is_cut_and_what_arrives_is_whole(text, channel):
    ours, theirs = channel
    assert send(ours, {"error": "ValueError", "detail": text, "step": 7})
    found = receive(theirs)
    assert (found["error"], found["step"]) == ("ValueError", 7)
    assert found["detail"]
    assert text.startswith(found["detail"])


def test_many_long_texts_and_a_long_list_still_arrive_as_one_object(channel):
    ours, theirs = channel
    message = {f"k{i}": "\x00" * MAX_BYTES for i in range(20)} | {"rows": ["y" * 1000] * 1000, "error": "E"}
    assert send(ours, message)
    assert receive(theirs)["error"] == "E"


def test_the_other_side_is_gone(channel):
    ours, theirs = channel
    theirs.close()
    assert not send(ours, {"n": 1})
    assert receive(ours) is None


def test_what_was_said_before_leaving_is_still_heard(channel):
    ours, theirs = channel
    send(theirs, {"error": "last words"})
    theirs.close()
    assert receive(ours) == {"error": "last words"}
    assert receive(ours) is None


def test_receiving_waits(channel):
    ours, theirs = channel
    threading.Timer(0.05, send, (theirs, {"n": 1})).start()
    assert receive(ours) == {"n": 1}


def test_a_value_that_json_does_not_know_is_sent_as_text(channel):
    ours, theirs = channel
    assert send(ours, {"path": socket.AF_UNIX, "error": ValueError("x")})
    assert receive(theirs)["error"] == "x"
