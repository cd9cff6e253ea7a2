"""Connects the processes of a run, so that none waits for one that has ended.

Without it a process waits for a dead partner until JAX's heartbeats time out, and then
ends with the stack traces of all threads. Here process 0 holds one socket to each other
process. The kernel closes a socket when a process ends, however it ends. A process that
finishes says goodbye first. A host that disappears is noticed by TCP's own probes.
"""

import atexit
import os
import secrets
import socket
import sys
import threading

import jax
import numpy as np

_GOODBYE = b"!"
_SECONDS_TO_CONNECT = 30
_ended = threading.Event()


def connect(coordinator: str | None) -> None:
    """Watches the other processes; ends this one in one line if one of them ends.

    Args:
      coordinator: HOST:PORT of process 0; None if JAX detected it.
    """
    from jax.experimental import multihost_utils

    token, server, address = b"", None, b""
    if jax.process_index() == 0:
        host = coordinator.rpartition(":")[0] if coordinator else socket.gethostname()
        server = socket.create_server(("", 0))
        token = secrets.token_hex(16).encode()
        address = f"{token.decode()} {host} {server.getsockname()[1]}".encode()
    message = np.zeros(512, np.uint8)
    message[: len(address)] = list(address)
    message = multihost_utils.broadcast_one_to_all(message)
    token, host, port = bytes(message).rstrip(b"\0").decode().split(" ")
    try:
        sockets = _accept(server, token) if server else _call(host, int(port), token)
    except OSError as error:
        # JAX notices a dead partner too, but late.
        print(f"the processes of this run cannot watch each other: {error}", flush=True)
        return
    for number, partner in sockets.items():
        _prepare(partner)
        threading.Thread(target=_watch, args=(number, partner), daemon=True).start()
    # Called before JAX waits for its partners, because it was registered later.
    atexit.register(_say_goodbye, sockets)


def wait_for_news() -> None:
    """Waits a moment in which this process ends if a partner has ended.

    A partner's end also makes JAX raise an error, which has no cause of its own.
    """
    _ended.wait(2)


def _accept(server, token):
    """{number: socket} of all other processes."""
    sockets = {}
    server.settimeout(_SECONDS_TO_CONNECT)
    with server:
        while len(sockets) < jax.process_count() - 1:
            partner, _ = server.accept()
            partner.settimeout(_SECONDS_TO_CONNECT)
            theirs, _, number = partner.makefile("r").readline().partition(" ")
            if secrets.compare_digest(theirs, token):
                sockets[int(number)] = partner
            else:
                partner.close()
    return sockets


def _call(host, port, token):
    partner = socket.create_connection((host, port), _SECONDS_TO_CONNECT)
    partner.sendall(f"{token} {jax.process_index()}\n".encode())
    return {0: partner}


def _prepare(partner):
    """Lets a socket wait for ever, but notice within 15 s that its host is gone."""
    partner.settimeout(None)
    partner.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            partner.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _watch(number, partner):
    try:
        finished = partner.recv(1) == _GOODBYE
    except OSError:
        finished = False
    if not finished:
        _ended.set()
        sys.stdout.flush()
        print(
            f"error: process {number} of this run has ended. Start all processes again "
            "to resume from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _say_goodbye(sockets):
    if getattr(sys, "last_value", None) is not None:
        os._exit(1)  # After a traceback; JAX would wait for the others.
    for partner in sockets.values():
        try:
            partner.sendall(_GOODBYE)
        except OSError:
            pass
