"""Looks into a model: what it is, where its bytes are, what a token costs."""

from __future__ import annotations

from onnxpress.compiler.inspect.summary import BlockFacts, KindFacts, Summary, summarize

__all__ = ["BlockFacts", "KindFacts", "Summary", "summarize"]
