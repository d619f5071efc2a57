"""The ledger of an artifact: what each quantized matrix lost, the one that lost most first.

It comes from the card: nothing is measured here. Errors are relative, in the sense of root mean squares.

    weight_error       of the matrix: ||Q - W|| / ||W||; snr_db is the same in decibels
    output_error       of its product with the activations of calibration text: ||(Q - W) X|| / ||W X||; known where a
                       pass looked at text
    activation_error   what int8 activations inside MatMulNBits add to its product, on random activations

    expected_kl        what rounding the matrix alone, in its format, adds to the KL divergence; `mixed` measures it

The share is that of a matrix in the sum of the last column or, where `mixed` was not used, in that of all squared
output errors or, where no pass looked at text, of all squared weight errors. The latter two are no shares of the KL
divergence: how much the error of a matrix weighs further on is not in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.report import Card

_NOTES = {
    "expected_kl": "share: of the KL divergence, as measured for each matrix alone with plain rounding",
    "output_error": "share: of the sum of squared relative output errors on calibration text, not of the KL",
    "weight_error": "share: of the sum of squared relative weight errors, not of the KL",
}


@dataclass(frozen=True)
class LedgerRow:
    """One quantized matrix.

    Attributes:
        site: its name when it was quantized; a later pass may have packed it together with others.
        made_by: the pass that stored it.
        kind: its role, such as "down".
        shape: (N, K).
        bits, block_size: of its codes.
        bytes: of codes, scales and zero points.
        snr_db: signal-to-noise ratio of the weights; None when they are exact.
        expected_kl: nats per token; None when not measured.
        weight_error, output_error, activation_error: relative; None when not measured.
        share: of the loss, 0 to 1; None when it was not measured as for the others.
    """

    site: str
    made_by: str
    kind: str
    shape: tuple[int, int]
    bits: int
    block_size: int
    bytes: int
    snr_db: float | None
    expected_kl: float | None
    weight_error: float | None
    output_error: float | None
    activation_error: float | None
    share: float | None


@dataclass(frozen=True)
class Ledger:
    """All rows, the largest share first.

    Attributes:
        rows: at least one.
        share_of: the column that shares are of: "expected_kl", "output_error" or "weight_error".
    """

    rows: tuple[LedgerRow, ...]
    share_of: str

    @property
    def note(self) -> str:
        """What the share is, and what it is not."""
        return _NOTES[self.share_of]

    def to_json(self) -> dict[str, Any]:
        """Facts for programs."""
        return {"share_of": self.share_of, "note": self.note, "rows": [asdict(row) for row in self.rows]}


def read_ledger(card: Card) -> Ledger:
    """The ledger of the artifact with this card.

    Raises:
        UnsupportedModelError: its passes quantized nothing, or the card is older than the ledger.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for one in card.get("passes") or ():
        for facts in one.get("ledger") or ():
            if "bits" in facts and "weight_error" in facts:
                found[facts["site"]] = one["pass"], facts  # rounded twice: what is stored counts
    if not found:
        raise UnsupportedModelError(
            f"{card.get('name', 'the artifact')}: its card has no ledger: its passes quantized no matrix",
            hint="write one with a recipe or a pass that quantizes: onnxpress optimize MODEL -o DIR --recipe int4",
        )
    share_of = "weight_error"
    if any("expected_kl" in facts for _, facts in found.values()) and all(
        "expected_kl" in facts or facts["weight_error"] == 0 for _, facts in found.values()
    ):
        share_of = "expected_kl"
    elif any(_number(facts, "output_error") is not None for _, facts in found.values()):
        share_of = "output_error"
    total = sum(_loss(facts, share_of) or 0.0 for _, facts in found.values())
    rows = [_row(made_by, facts, share_of, total) for made_by, facts in found.values()]
    # Those without a share come last, and among them the largest weight error first.
    rows.sort(key=lambda row: (-1.0 if row.share is None else row.share, row.weight_error or 0.0), reverse=True)
    return Ledger(tuple(rows), share_of)


def _row(made_by: str, facts: dict[str, Any], share_of: str, total: float) -> LedgerRow:
    loss = _loss(facts, share_of)
    num_out, num_in = facts["shape"]
    return LedgerRow(
        site=facts["site"],
        made_by=made_by,
        kind=facts["kind"],
        shape=(num_out, num_in),
        bits=facts["bits"],
        block_size=facts["block_size"],
        bytes=facts["bytes"],
        snr_db=_number(facts, "snr_db"),
        expected_kl=_number(facts, "expected_kl"),
        weight_error=_number(facts, "weight_error"),
        output_error=_number(facts, "output_error"),
        activation_error=_number(facts, "activation_error"),
        share=None if loss is None else loss / total if total else 0.0,
    )


def _loss(facts: dict[str, Any], share_of: str) -> float | None:
    """What adds up: a divergence as it is, an error squared."""
    value = 0.0 if facts["weight_error"] == 0 and share_of == "expected_kl" else _number(facts, share_of)
    return value if value is None or share_of == "expected_kl" else value * value


def _number(facts: dict[str, Any], name: str) -> float | None:
    """A finite number, None otherwise."""
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None
