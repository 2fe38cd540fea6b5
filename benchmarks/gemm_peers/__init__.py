"""The peers of the GEMM benchmark, by name, ours first."""

from __future__ import annotations

from . import gemlite_peers, humming_peers, our_peers, torch_peers
from .base import Activations, Peer, Unavailable, WrongResult
from .humming_peers import compile_ahead

__all__ = ["PEERS", "Activations", "Peer", "Unavailable", "WrongResult", "compile_ahead"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for module in (our_peers, torch_peers, humming_peers, gemlite_peers) for peer in module.PEERS
}
