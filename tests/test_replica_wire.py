"""The connections of replicas: who may call, and what comes whole from another process."""

from __future__ import annotations

import pickle
import socket
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection

import pytest
from server_fixtures import wait_until

from stallfree.errors import InvalidRequestError, OverloadedError
from stallfree.replicas.wire import Gate, connect, has_ended


def test_strangers_are_turned_away() -> None:
    calls: list[Connection] = []
    gate = Gate("127.0.0.1", calls.append)
    place = gate.place
    silent = socket.create_connection((place.host, place.port))
    with pytest.raises(AuthenticationError):
        Client((place.host, place.port), authkey=b"guessed")
    with connect(place) as friend:
        wait_until(lambda: len(calls) == 1)
        friend.send("hello")
        assert calls[0].recv() == "hello"
    silent.close()
    assert not has_ended(place)
    gate.close()
    wait_until(lambda: has_ended(place))


def test_errors_come_whole_from_another_process() -> None:
    for error in (OverloadedError("too much", 3.5), InvalidRequestError("wrong", "prompt")):
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)
