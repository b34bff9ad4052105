"""The guard of the unit tests guards."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("call", ["connect", "connect_ex", "bind"])
def test_a_unit_test_cannot_open_a_socket(call: str) -> None:
    with socket.socket() as sock, pytest.raises(AssertionError, match="opened a socket"):
        getattr(sock, call)(("127.0.0.1", 0))
