"""Continuous batching: requests join and leave a running batch whose keys and values lie in shared pages."""

from infer.engine.engine import Engine
from infer.engine.pages import PagePool
from infer.engine.request import Request
from infer.engine.running import Full, Handle, Piece, RunningEngine, Stopped

__all__ = ["Engine", "Full", "Handle", "PagePool", "Piece", "Request", "RunningEngine", "Stopped"]
