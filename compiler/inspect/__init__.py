"""Looks into a model: what it is, where its bytes are, what a token costs, what each quantized matrix lost."""

from __future__ import annotations

from onnxpress.compiler.inspect.ledger import Ledger, LedgerRow, read_ledger
from onnxpress.compiler.inspect.summary import BlockFacts, KindFacts, Summary, summarize

__all__ = ["BlockFacts", "KindFacts", "Ledger", "LedgerRow", "Summary", "read_ledger", "summarize"]
