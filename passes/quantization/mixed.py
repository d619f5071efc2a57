"""Picks bits and block size for every matrix by what its error costs the model, within a size, a loss, or a mean.

Each matrix (queries with keys, and gate with up, count as one: they are computed as one) is rounded alone and the KL
divergence of the model's predictions measured. What another format would cost follows from the error of the weights in
it, to which the divergence is proportional while it is small; with method='gptq' from the error that fitting a few of
its rows leaves at its outputs. A knapsack solver then spends the bytes.

Paper:   arXiv:1911.03852 (HAWQ-V2: sensitivity times error, summed); measured here instead of a Hessian's trace
Axes:    N out features, K in features
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.allocation import Option, allocate
from onnxpress.compiler.errors import OptionError, PreconditionError, UnsupportedModelError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.sensitivity import Sensitivity, digest_of
from onnxpress.passes.quantization._fitted_errors import fitted_errors
from onnxpress.passes.quantization._mixed import Fitted, Rounded
from onnxpress.passes.quantization._rounding import Floats, round_matrix
from onnxpress.passes.quantization._weight_only import Format, Site, WeightOnly, fitting_block, token_tables

# From small to large
_FORMATS = (
    Format(4, 128, False),
    Format(4, 64, False),
    Format(4, 32, True),
    Format(4, 32, False),
    Format(8, 64, True, "max"),
    Format(8, 32, True, "max"),
)
_PROBE = Format(4, 32, True)  # in which the cost of a matrix is measured
_ROWS = 1024  # of a matrix that tell the error of a format
_PER_NODE = 900  # bytes that codes, scales and zero points and their names take in the graph at most
_EXACT = 1e-8  # squared relative error below which a format holds the weights as they are
_RUINED = 1e6  # cost of a matrix without which the outputs are not finite
_FITTING_TOKENS = 4096  # of text that tell how much fitting helps
_TRIES = 7  # plans that are run to meet a loss


@dataclass
class _Item:
    """Matrices that get one format."""

    sites: list[Site]
    formats: list[Format] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    probe: Format = _PROBE  # in which it was rounded to measure
    cost: float = 0.0  # of that

    @property
    def name(self) -> str:
        return "+".join(site.name for site in self.sites)

    @property
    def kind(self) -> str:
        return "+".join(site.linears[0].kind if site.linears else "embedding" for site in self.sites)


@dataclass(frozen=True, kw_only=True)
class Mixed(Pass):
    """Stores matrices in 4 or 8 bits, each in the format that its place in the model deserves.

    Exactly one of `size`, `kl` and `bits` says how far to go. Needs float weights: comes before any other quantizer,
    and before `pack`.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:1911.03852"

    size: str | None = None  # of the model's files together: "90MB" is 90,000,000 bytes, MiB and GB are known too
    # KL divergence (nats per token) that rounding to nearest may cost; fitting then does better
    kl: float | None = None
    bits: float | None = None  # per weight on average, scales included, over what is quantized
    method: Literal["gptq", "rtn"] = "gptq"  # how the codes are found: fitted to calibration text, or rounded
    tokens: int = 16384  # of calibration text for gptq
    length: int = 1024  # tokens of a window of it
    probe: int = 512  # tokens on which costs are measured
    scale_bits: int = 8  # of a float32 scale in the file: 8 or 32; see `rtn`
    accuracy_level: int = 4  # of 4-bit matrices on the CPU: 4 int8 activations, 0 float activations
    exclude: tuple[str, ...] = ()  # patterns of names that stay float: "block0.*", "*.down", "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("size", "kl", "bits") if getattr(self, name) is not None]
        if len(given) != 1:
            raise OptionError(
                f"mixed: expected one of size, kl and bits, got {' and '.join(given) or 'none'}",
                hint="for instance mixed(size='90MB'), mixed(kl=0.05) or mixed(bits=4.5)",
            )
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '90MB' or '1.2GiB'")
        self.check(self.kl is None or self.kl > 0, "kl", "positive", "0.05 is a mild loss")
        self.check(self.bits is None or 4 < self.bits <= 9, "bits", "more than 4 and at most 9", "try 4.5")
        self.check(self.probe >= 16, "probe", "at least 16", "512 suits most models")
        for name, plain in (("tokens", 16384), ("length", 1024)):
            is_used = self.method == "gptq" or getattr(self, name) == plain
            self.check(is_used, name, "left out with method='rtn'", "rounding reads no text")
        self._inner({})  # checks what it is given

    @classmethod
    def example(cls, model: ir.Model) -> Mixed:
        return cls(bits=6.0, tokens=32, length=16, probe=16)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        scratch = Report()
        items = self._items(model, context, scratch)
        if not items:
            self._check_size(model)
            return self._inner({}).run(model, context)  # says why of each matrix
        sites = [site for item in items for site in item.sites]
        if any(site.dtype == ir.DataType.BFLOAT16 for site in sites):
            raise UnsupportedModelError(
                "mixed: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16), or rtn",
            )
        linears = [linear for site in sites for linear in site.linears]
        sensitivity, ids_WS, facts = Sensitivity.on_text(model, context.calibration, self.probe, linears)
        measure = sensitivity.measure
        if self.kl is not None and measure != "KL divergence":
            raise OptionError("mixed: kl has no meaning for a model without logits", hint="give size= or bits=")
        self._price(items, sensitivity, model, context, ids_WS)
        if self.method == "gptq":
            self._reprice(items, model, context)
        chosen = self._choose(items, model, sensitivity)
        del sensitivity  # holds the activations of the whole model
        overrides: dict[str, dict[str, int | bool | str]] = {}
        expected = 0.0
        for item, index in zip(items, chosen, strict=True):
            expected += item.options[index].cost
            for site in item.sites:
                for name in _names(site):
                    overrides[name] = {**item.formats[index]._asdict()}
                    if self.method == "gptq":
                        del overrides[name]["scales"]  # finds its own
        report = self._inner(overrides).rewrite(model, context)
        costs = {site.name: (item, index) for item, index in zip(items, chosen, strict=True) for site in item.sites}
        for row in report.ledger:
            item, index = costs[row["site"]]
            # What is measured together is divided evenly.
            row["expected_kl" if measure == "KL divergence" else "expected_output_error"] = item.options[
                index
            ].cost / len(item.sites)
        report.calibration.setdefault("costs", f"{measure} on {facts['text']}")
        how = "rounded" if self.method == "rtn" else "fitted"
        report.metrics[f"expected_if_{how}"] = expected
        report.notes += _table(items, chosen, f"{measure} expected of {how} codes", expected)
        return report

    def _check_size(self, model: ir.Model) -> None:
        """Raises PreconditionError where a size is asked for and nothing is left that could be made smaller."""
        present = sizes.bytes_besides(model, [])
        if self.size is not None and present > (sizes.read(self.size) or 0):
            raise PreconditionError(
                f"mixed: size={self.size} cannot be met: no float matrix is left, "
                f"and the files take {sizes.written(present)}",
                hint="begin with the float model; rtn(requantize=True) rounds codes anew",
            )

    def _inner(self, overrides: dict[str, dict[str, int | bool | str]]) -> WeightOnly:
        common: dict[str, Any] = {
            "accuracy_level": self.accuracy_level,
            "scale_bits": self.scale_bits,
            "exclude": self.exclude,
            "overrides": overrides,
        }
        if self.method == "rtn":
            return Rounded(**common)
        return Fitted(**common, tokens=self.tokens, length=self.length)

    def _items(self, model: ir.Model, context: Context, scratch: Report) -> list[_Item]:
        """What is decided on, with the formats that are possible for it."""
        linears = find_linears(model, expand_pairs=True)
        embeddings = token_tables(find_embeddings(model, linears))
        self._inner({}).check_effect(linears, embeddings)
        sites = self._inner({}).plan(linears, embeddings, context, scratch)
        grouped: dict[tuple[int, str], _Item] = {}
        for number, site in enumerate(sites):
            kind = site.linears[0].kind if site.linears else "embedding"
            partner = {"q": "qk", "k": "qk", "gate": "gate_up", "up": "gate_up"}.get(kind)
            key = (id(site.linears[0].activation), partner) if partner else (-number, "")
            grouped.setdefault(key, _Item([])).sites.append(site)
        for item in grouped.values():
            for one in _FORMATS:
                chosen = one._replace(scale_bits=self.scale_bits)
                if context.target.provider == "cuda":
                    chosen = chosen._replace(symmetric=True)
                blocks = {
                    fitting_block(site.shape[1], one.block_size, one.bits, exact=bool(site.embeddings))
                    for site in item.sites
                }
                if blocks == {one.block_size} and chosen not in item.formats:
                    item.formats.append(chosen)
            if not item.formats:  # narrower than any of these blocks
                item.formats = [item.sites[0].format, item.sites[0].format._replace(bits=8)]
        return list(grouped.values())

    def _price(
        self, items: list[_Item], sensitivity: Sensitivity, model: ir.Model, context: Context, ids_WS: Floats
    ) -> None:
        """Measures what each item costs in `_PROBE`, and derives what it would in its other formats."""
        digest = hashlib.sha256(np.ascontiguousarray(ids_WS).data)
        digest.update(digest_of(model).encode())
        section = context.journal.section("mixed", context.target.name, str(self.probe))
        for number, item in enumerate(context.track(items, f"{self.name()}: what each matrix costs")):
            # Weights that were on such a grid before show nothing there: then the coarsest format is the probe.
            item.probe = probe = _PROBE if _error(item, _PROBE) > _EXACT else item.formats[0]
            record = section.read(str(number), digest.hexdigest())
            if record is None:
                found = sensitivity.distance(_replacements(item, probe))
                record = {"cost": np.array(found if np.isfinite(found) else _RUINED)}
                section.write(str(number), digest.hexdigest(), record)
            item.cost = float(record["cost"])
            before = _error(item, probe)
            ratios = [_error(item, one) / before if before else 0.0 for one in item.formats]
            item.options = [
                Option(item.cost * (ratio if np.isfinite(ratio) else 1.0), _nbytes(item, one))
                for ratio, one in zip(ratios, item.formats, strict=True)
            ]

    def _reprice(self, items: list[_Item], model: ir.Model, context: Context) -> None:
        """Costs after fitting: that of rounding, times what fitting leaves of the error at the matrix's outputs."""
        formats = {id(site): [item.probe, *item.formats] for item in items for site in item.sites}
        # What fitting does for a head it does not do for the table of tokens it shares its matrix with.
        sites = [site for item in items for site in item.sites if not site.embeddings]
        tokens = min(self.tokens, _FITTING_TOKENS)
        damping = Fitted.damping * max(1.0, _FITTING_TOKENS / tokens)
        errors = fitted_errors(
            model,
            formats,
            sites,
            context,
            tokens=tokens,
            length=min(self.length, tokens),
            damping=damping,
            label=f"{self.name()}: what fitting leaves of it",
        )
        for item in items:
            known = [errors[id(site)] for site in item.sites if id(site) in errors]
            if len(known) < len(item.sites) or not item.cost:
                continue
            before = sum(one for one, _ in known)
            if before > 0:
                item.options = [
                    Option(item.cost * sum(after[index] for _, after in known) / before, option.nbytes)
                    for index, option in enumerate(item.options)
                ]

    def _choose(self, items: list[_Item], model: ir.Model, sensitivity: Sensitivity) -> list[int]:
        """The index of a format for each item."""
        options = [item.options for item in items]
        least = sum(min(one.nbytes for one in some) for some in options)
        most = sum(max(one.nbytes for one in some) for some in options)
        if self.kl is not None:
            return self._meet(items, sensitivity, self.kl, least, most)
        weights = sum(site.shape[0] * site.shape[1] for item in items for site in item.sites)
        if self.size is not None:
            other = _other_bytes(model, items)
            budget = (sizes.read(self.size) or 0) - other
        else:
            other, budget = 0, int((self.bits or 0) * weights / 8)
        chosen = allocate(options, budget)
        if chosen is None:
            smallest = f"size='{sizes.written(least + other)}'"
            nearest = smallest if self.size else f"bits={8 * least / weights + 5e-4:.3f}"
            raise OptionError(
                f"mixed: {'size' if self.size else 'bits'}={self.size or self.bits} cannot be met: all matrices in the "
                f"smallest format take {nearest}",
                hint=f"the nearest is {nearest}; less needs another pass before this one, such as drop_blocks or svd",
            )
        return chosen

    def _meet(self, items: list[_Item], sensitivity: Sensitivity, limit: float, least: int, most: int) -> list[int]:
        """The smallest plan of which the measured loss, all matrices rounded to nearest, is within the limit."""
        options = [item.options for item in items]

        def measured(plan: list[int]) -> float:
            return sensitivity.distance(_OnDemand(items, plan))

        best = [max(range(len(some)), key=lambda index: some[index].nbytes) for some in options]
        if (nearest := measured(best)) > limit:
            raise OptionError(
                f"mixed: kl={limit} cannot be met: all matrices in 8 bits cost {nearest:.2g}",
                hint=f"the nearest is kl={nearest * 1.05:.2g}",
            )
        low, high = float(least), float(most)
        for _ in range(_TRIES):
            plan = allocate(options, (low + high) / 2)
            assert plan is not None
            if measured(plan) <= limit:
                best, high = plan, (low + high) / 2
            else:
                low = (low + high) / 2
        return best


class _OnDemand(Mapping[int, Floats]):
    """The rounded weights of a plan by the id of their value, each made when it is asked for: never all at once."""

    def __init__(self, items: Sequence[_Item], plan: Sequence[int]) -> None:
        self._made_by: dict[int, tuple[_Item, Format]] = {}
        for item, index in zip(items, plan, strict=True):
            for site in item.sites:
                values = [one.weight for one in site.linears] + [one.table for one in site.embeddings]
                self._made_by |= {id(value): (item, item.formats[index]) for value in values}

    def __getitem__(self, key: int) -> Floats:
        return _replacements(*self._made_by[key])[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._made_by)

    def __len__(self) -> int:
        return len(self._made_by)


def _names(site: Site) -> list[str]:
    """What an override may call the site; a table that is only gathered has a name of its own."""
    return [linear.name for linear in site.linears] or [site.name]


def _replacements(item: _Item, chosen: Format) -> dict[int, Floats]:
    """Weights of an item after rounding, as the graph stores them, by the id of their value."""
    found: dict[int, Floats] = {}
    for site in item.sites:
        w_NK = _rounded(site, chosen, site.read())[0].w_NK()
        for linear in site.linears:
            found[id(linear.weight)] = linear.stored_form(w_NK)
        for embedding in site.embeddings:
            tensor = embedding.table.const_value
            assert tensor is not None
            found.setdefault(id(embedding.table), w_NK.astype(tensor.dtype.numpy(), copy=False))
    return found


def _rounded(site: Site, chosen: Format, w_NK: Floats) -> tuple[CodedMatrix, float, float]:
    return round_matrix(w_NK, **chosen._asdict(), scale_dtype=site.dtype.numpy())


def _error(item: _Item, chosen: Format) -> float:
    """Squared error of a format relative to the weights, on some rows; summed over the matrices of an item."""
    total = 0.0
    for site in item.sites:
        w_NK = site.read()
        rows = w_NK[:: -(-len(w_NK) // _ROWS)]
        _, loss, norm = _rounded(site, chosen, np.ascontiguousarray(rows))
        total += loss / norm if norm else 0.0
    return total


def _nbytes(item: _Item, chosen: Format) -> int:
    """Bytes of codes, scales and zero points."""
    total = 0
    for site in item.sites:
        rows, columns = site.shape
        blocks = -(-columns // chosen.block_size)
        zeros = 0 if chosen.symmetric else -(-blocks * chosen.bits // 8)
        scales = blocks * site.dtype.numpy().itemsize
        if chosen.scale_bits == 8 and site.dtype == ir.DataType.FLOAT:
            scales = min(scales, blocks + 4)
        total += rows * (blocks * (chosen.block_size * chosen.bits // 8) + scales + zeros)
    return total


def _other_bytes(model: ir.Model, items: Sequence[_Item]) -> int:
    """Bytes of the finished model's files that are not codes, scales and zero points; rather a few too many."""
    sites = [site for item in items for site in item.sites]
    weights = [one.weight for site in sites for one in site.linears]
    weights += [one.table for site in sites for one in site.embeddings]
    nodes = sum(len(site.linears) + len(site.embeddings) for site in sites)
    return sizes.bytes_besides(model, weights) + _PER_NODE * nodes


def _table(items: Sequence[_Item], chosen: Sequence[int], what: str, expected: float) -> list[str]:
    """What was decided, per kind: how many matrices in which format, and their part of the expected loss."""
    silent = [item.name for item in items if item.cost == 0]
    lines = [f"{what}: {expected:.4f}; by kind of matrix:"]
    kinds: dict[str, tuple[Counter[str], float]] = {}
    for item, index in zip(items, chosen, strict=True):
        one = item.formats[index]
        counts, cost = kinds.get(item.kind, (Counter(), 0.0))
        counts[f"{one.bits} bits in blocks of {one.block_size}"] += 1
        kinds[item.kind] = counts, cost + item.options[index].cost
    for kind, (counts, cost) in kinds.items():
        formats = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
        lines.append(f"  {kind}: {formats}; {cost / expected if expected else 0:.0%} of the loss")
    if silent:
        lines.append(f"  without any effect on the output that is measured: {', '.join(silent[:8])} ({len(silent)})")
    return lines
