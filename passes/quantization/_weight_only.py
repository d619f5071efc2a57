"""What passes that store weights in few bits share: which matrices, in which format, and the nodes they become.

Axes: N out features, K in features, V rows and H width of a token table
"""

from __future__ import annotations

import abc
import copy
import fnmatch
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import formats
from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import OptionError, StreamingError, UnsupportedModelError, near_miss
from onnxpress.compiler.linears import Embedding, Linear, find_embeddings, find_linears
from onnxpress.compiler.nbits import (
    BITS,
    BLOCK_SIZES,
    CodedMatrix,
    activation_error,
    replace_embedding,
    replace_linear,
    slow_kernel,
    store,
)
from onnxpress.compiler.other_weights import find_other_weights, node_format
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.threads import workers
from onnxpress.passes.quantization._least_squares import quadratic
from onnxpress.passes.quantization._rounding import Floats, round_matrix

T = TypeVar("T")


class Format(NamedTuple):
    """How a matrix is stored, and how its scales are found where nothing else decides."""

    bits: int
    block_size: int
    symmetric: bool
    scales: Literal["max", "mse"] = "mse"
    scale_bits: int = 32


class Coded(NamedTuple):
    """Codes of a site with their squared error and the squared norm of the weights."""

    matrix: CodedMatrix
    loss: float
    norm: float
    facts: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    side: tuple[CodedMatrix, CodedMatrix] | None = None  # [R, K] and [N, R], whose product is added

    def w_NK(self) -> Floats:  # noqa: N802
        """What it computes with, float32 [N, K]."""
        w_NK = self.matrix.w_NK()
        return w_NK if self.side is None else w_NK + self.side[1].w_NK() @ self.side[0].w_NK()


@dataclass
class Site:
    """One matrix to quantize, with every node that reads it."""

    name: str
    format: Format
    read: Callable[[], Floats]
    dtype: ir.DataType
    shape: tuple[int, int]
    rank: int = 0  # of the product that is added to what is rounded
    linears: list[Linear] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)


FLOATS = ("MatMul", "Gemm", "Transpose+MatMul")  # holders of which calibration sees the activation
_LEDGER_LENGTH = 1024  # tokens of a window of the ledger's text, at most
_ROLES = {*KINDS, "embedding"}
# Options that an override may have, with their values
OVERRIDABLE: dict[str, tuple[Any, ...]] = {
    "bits": BITS,
    "block_size": BLOCK_SIZES,
    "symmetric": (False, True),
    "scale_bits": (8, 32),
}


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Pass):
    """Base of passes that store weights in 2, 4 or 8 bits and leave activations alone; a subclass finds the codes.

    Linears become MatMulNBits, embeddings GatherBlockQuantized; embedding and head share one set of bytes.
    `accuracy_level=4` computes with int8 activations on the CPU, which is what makes it fast, and adds an error of its
    own: the report keeps `weight_error` (relative, over all matrices) and `activation_error` (relative, level 4 against
    exact products) apart. The level does not apply to 2 and 8 bits, for which the CPU has no other fast kernel.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    overridable: ClassVar[dict[str, tuple[Any, ...]]] = OVERRIDABLE

    bits: int = 4  # of linears: 2, 4 or 8
    block_size: int = 32  # weights that share a scale: 16, 32, 64, 128 or 256
    symmetric: bool = True  # False: zero points too; smaller error, slower on CUDA
    # Of a float32 scale in the file. 8: whole multiples of a unit of their row, at a fourth of the bytes and no
    # loss that was seen; the kernels see float32 either way. 32: as they are found.
    scale_bits: int = 8
    head_bits: int | None = None  # of embedding and head; None: as the linears
    head_block_size: int | None = None  # of embedding and head; None: as the linears
    accuracy_level: int = 4  # of 4-bit linears on the CPU: 4 int8 activations, 0 float activations
    requantize: bool = False  # matrices that MatMulNBits or GatherBlockQuantized holds already: read back, rounded anew
    ledger_tokens: int = 0  # of calibration text on which the error of every output is measured, for the ledger
    exclude: tuple[str, ...] = ()  # patterns of names that stay float: "block0.*", "*.down", "head", "embedding"
    # Role ("gate_up") or pattern of names ("block0.*") to options of its own: {"gate_up": {"block_size": 64}}. The last
    # one that fits counts. A role that the model lacks is no error, a pattern without a match is.
    overrides: dict[str, dict[str, int | bool | str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("bits", "head_bits"):
            self.check(getattr(self, option) in (*BITS, None), option, "2, 4 or 8", "use 4 or 8")
        for option in ("block_size", "head_block_size"):
            expected = f"one of {', '.join(map(str, BLOCK_SIZES))}"
            self.check(getattr(self, option) in (*BLOCK_SIZES, None), option, expected, "use 32 or 128")
        self.check(self.scale_bits in (8, 32), "scale_bits", "8 or 32", "8 makes the files smaller")
        self.check(self.accuracy_level in (0, 4), "accuracy_level", "0 or 4", "4 is fast, 0 keeps activations in float")
        if self.accuracy_level != 4 and self.bits != 4:
            raise OptionError(
                f"{self.name()}: accuracy_level={self.accuracy_level} has no fast kernel for {self.bits} bits on a CPU",
                hint="leave it at 4, or use bits=4",
            )
        self.check(self.ledger_tokens >= 0, "ledger_tokens", "0 or more", "4096 suits most models")
        for name, changes in self.overrides.items():
            for option, value in changes.items():
                self.check(option in self.overridable, "overrides", f"of the options {', '.join(self.overridable)}")
                if value not in self.overridable[option]:
                    allowed = " or ".join(map(str, self.overridable[option]))
                    raise OptionError(
                        f"{self.name()}: overrides, {name}: {option} must be {allowed}, got {value!r}",
                        hint=f"the options of an override are those of {self.name()}, for one role or name",
                    )
        object.__setattr__(self, "overrides", copy.deepcopy(self.overrides))  # nobody else's dict
        for is_head in (False, True):
            self._check_kernel(self._format([], "", is_head=is_head), "cpu")

    def _format(self, names: list[str], kind: str, *, is_head: bool) -> Format:
        """What the options say about a matrix of these names."""
        return self._overridden(
            Format(self.bits, self.block_size, self.symmetric, scale_bits=self.scale_bits), names, kind, is_head=is_head
        )

    def _overridden(self, found: Format, names: list[str], kind: str, *, is_head: bool) -> Format:
        if is_head:
            found = found._replace(bits=self.head_bits or self.bits, block_size=self.head_block_size or self.block_size)
        for pattern, changes in self.overrides.items():
            if pattern == kind or any(fnmatch.fnmatchcase(name, pattern) for name in names):
                found = found._replace(**changes)  # type: ignore[arg-type]  # checked in __post_init__
        return found

    def _check_kernel(self, chosen: Format, provider: str) -> None:
        reason = slow_kernel(chosen.bits, chosen.block_size, provider)
        if reason is not None:
            raise OptionError(
                f"{self.name()}: {reason}", hint="use block_size=64" if chosen.bits == 2 else "use block_size=128"
            )

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        for is_head in (False, True):
            self._check_kernel(self._format([], "", is_head=is_head), context.target.provider)
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        tables = find_embeddings(model, linears)
        embeddings = token_tables(tables)
        self.check_effect(linears, embeddings)
        sites = self.plan(linears, embeddings, context, report)
        for table in tables:
            if table not in embeddings:
                report.skip(table.table.name or "table", "narrower than the token table: kept exact")
        for other in find_other_weights(model, linears, tables):
            unread = ", which requantize does not read" if self.requantize and other.format else ""
            report.skip(other.site, other.reason + unread)
        for site in sites:
            self._check_kernel(site.format, context.target.provider)
        loss = norm = 0.0
        weights = nbytes = 0
        done = self.code(model, sites, linears, context, report)
        if self.ledger_tokens:
            done = self._with_output_errors(model, [*done], linears, context, report)
        for site, coded in done:
            if not math.isfinite(coded.norm):
                report.skip(site.name, "weights are not finite")
                continue
            matrix, sides = coded.matrix, coded.side or ()
            put(model.graph, site, matrix, self.accuracy_level, context, coded.side)
            loss, norm = loss + coded.loss, norm + coded.norm
            weights += site.shape[0] * site.shape[1]
            held = matrix.nbytes + sum(one.nbytes for one in sides)
            nbytes += held
            note(
                report,
                site,
                matrix,
                held,
                weight_error=math.sqrt(coded.loss / coded.norm) if coded.norm else 0.0,
                snr_db=10 * math.log10(coded.norm / coded.loss) if coded.loss and coded.norm else math.inf,
                **coded.facts,
            )
        if weights:
            report.metrics["weight_error"] = math.sqrt(loss / norm) if norm else 0.0
            report.metrics["bits_per_weight"] = 8 * nbytes / weights
            measure_activations(sites, context, report)
        return report

    @abc.abstractmethod
    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        """The codes of every site, in any order; a site may be given to `report.skip` instead.

        Args:
            model: changes with every site that is given.
            sites: what is to be stored, and how.
            linears: all of the model, `sites` or not.
            context: target, seed, progress, text.
            report: of the run.
        """

    def _with_output_errors(
        self, model: ir.Model, done: list[tuple[Site, Coded]], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        """What `code` gave, with the errors that text shows added to its facts where they are not among them."""
        codes = {id(site): coded for site, coded in done if "output_error" not in coded.facts}
        site_of = {
            id(linear): site
            for site, _ in done
            for linear in site.linears
            if id(site) in codes and linear.holder in FLOATS
        }
        wanted = [linear for linear in linears if id(linear) in site_of]
        errors: dict[int, float] = {}
        if wanted:
            tokens = self.ledger_tokens
            windows = calibration_windows(model, wanted, site_of, context, report, tokens, min(tokens, _LEDGER_LENGTH))
            with Calibration(model, windows, wanted, context.work_dir) as run:
                for stage in context.track(run.stages, "ledger"):
                    group = run.observe(stage)
                    for linear in group.linears:
                        site = site_of[id(linear)]
                        if id(site) not in errors:  # where layers share a weight, the first of them counts
                            error = output_error(site.read(), codes[id(site)].matrix.w_NK(), group.stats)
                            if math.isfinite(error):
                                errors[id(site)] = error
        for site, coded in done:
            facts = {**coded.facts, "output_error": errors[id(site)]} if id(site) in errors else coded.facts
            yield site, coded._replace(facts=facts)

    def check_effect(self, linears: list[Linear], embeddings: list[Embedding]) -> None:
        apart = sum(not is_tied(one) for one in embeddings)
        names = [one.name for one in linears] + ["embedding"] * bool(embeddings)
        names += [f"embedding.{number}" for number in range(2, apart + 1)]
        for option, patterns in (("exclude", self.exclude), ("overrides", [*self.overrides])):
            for pattern in patterns:
                is_role = option == "overrides" and pattern in _ROLES
                if not is_role and not fnmatch.filter(names, pattern):
                    known = sorted(_ROLES) if option == "overrides" else names
                    raise OptionError(
                        f"{self.name()}: {option}={pattern!r} matches no linear",
                        hint=f"{near_miss(pattern, known)}; names are like {names[:3]}",
                    )
        has_head = bool(embeddings) or any(one.kind == "head" for one in linears)
        for option in ("head_bits", "head_block_size"):
            if getattr(self, option) is not None and not has_head:
                raise OptionError(
                    f"{self.name()}: {option} has no effect, the model has no head and no embedding",
                    hint="leave it out",
                )

    def plan(self, linears: list[Linear], embeddings: list[Embedding], context: Context, report: Report) -> list[Site]:
        """One site per matrix; nodes that share a matrix share the site. Reasons against go to the report."""
        tied = {id(one.head): one for one in embeddings if is_tied(one)}
        sites: dict[tuple[int, bool], Site] = {}
        for linear in linears:
            embedding = tied.get(id(linear))
            is_head = linear.kind == "head" or embedding is not None
            names = [linear.name] + ["embedding"] * (embedding is not None)
            chosen = self._format(names, linear.kind, is_head=is_head)
            block = fitting_block(linear.num_in, chosen.block_size, chosen.bits, exact=embedding is not None)
            reason = self._refuse(names, linear.node, chosen._replace(block_size=block or 0), linear.weight, context)
            if linear.kind == "router" and not {"router", *names} & self.overrides.keys():
                reason = reason or "it picks the experts, and is small"
            if block is None:
                reason = reason or f"embedding width {linear.num_in} is not a multiple of any block size"
            if reason is None and block is not None:
                key = id(linear.weight), linear.is_turned()
                chosen = chosen._replace(block_size=block)
                new = Site(linear.name, chosen, linear.w_NK, dtype_of(linear.node, linear.weight), linear.shape)
                if (
                    not linear.is_quantized
                    and new.shape[0] * -(-new.shape[1] // block) * (block * chosen.bits // 8 + 4) >= linear.nbytes
                ):
                    report.skip(linear.name, "codes and scales would take no less than the weights do")
                    continue
                site = sites.setdefault(key, new)
                if site.format != new.format:
                    raise OptionError(
                        f"{self.name()}: {site.name} and {linear.name} share a weight, but the options store it "
                        f"in two ways: {site.format} and {new.format}",
                        hint="give overrides that fit both names",
                    )
                site.linears.append(linear)
                if embedding is not None:
                    site.embeddings.append(embedding)
            elif reason is not None:
                report.skip(linear.name, reason)
        for number, embedding in enumerate(one for one in embeddings if not is_tied(one)):
            name = "embedding" if number == 0 else f"embedding.{number + 1}"
            chosen = self._format([name], "embedding", is_head=True)
            block = fitting_block(embedding.width, chosen.block_size, chosen.bits, exact=True)
            chosen = chosen._replace(block_size=block or 0)
            reason = self._refuse([name], embedding.node, chosen, embedding.table, context)
            if reason is not None or block is None:
                report.skip(name, reason or f"width {embedding.width} is not a multiple of any block size")
                continue
            key = id(embedding.table), False
            shape = embedding.num_rows, embedding.width
            dtype = dtype_of(embedding.node, embedding.table)
            site = sites.setdefault(key, Site(name, chosen, embedding.table_VH, dtype, shape))
            site.embeddings.append(embedding)
        return list(sites.values())

    def _refuse(
        self, names: list[str], node: ir.Node, chosen: Format, weight: ir.Value, context: Context
    ) -> str | None:
        if stored := node_format(node):
            if not self.requantize:
                return f"already quantized: {stored}; rtn(requantize=True) rounds it anew"
            if stored == _described(node.op_type, chosen):
                return f"already quantized: {stored}, as asked for"
            if node.op_type == "MatMul":
                return f"already quantized: {stored}, together with its activation, which requantize does not read"
            if len(node.inputs) > 4 and node.op_type == "MatMulNBits" and node.inputs[4] is not None:
                return f"already quantized: {stored}, with its columns in another order (g_idx)"
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude):
            return "excluded"
        return without_kernel(dtype_of(node, weight), context)


def note(report: Report, site: Site, matrix: CodedMatrix, nbytes: int, **facts: Any) -> None:
    """The row of a stored site in the ledger; `nbytes` is all that it takes, `facts` are about its errors."""
    report.change(
        site.name,
        kind=site.linears[0].kind if site.linears else "embedding",
        shape=list(site.shape),
        bits=matrix.bits,
        block_size=matrix.block_size,
        bytes=nbytes,
        **facts,
    )


def put(
    graph: ir.Graph,
    site: Site,
    matrix: CodedMatrix,
    accuracy_level: int,
    context: Context,
    side: tuple[CodedMatrix, CodedMatrix] | None = None,
) -> None:
    """Stores the codes and lets every node of the site compute with them; `accuracy_level` is that of 4 bits."""
    stored = store(graph, site.name, matrix)
    sides = side and (store(graph, f"{site.name}.A", side[0]), store(graph, f"{site.name}.B", side[1]))
    level = accuracy_level if matrix.bits == 4 else 4
    for linear in site.linears:
        replace_linear(linear, stored, level, sides)
    for embedding in site.embeddings:
        is_cuda = context.target.provider == "cuda"
        replace_embedding(embedding, stored, shared=bool(site.linears), explicit_zero=is_cuda)


def measure_activations(sites: list[Site], context: Context, report: Report) -> None:
    """Notes what int8 activations add on the CPU, as a metric and in every row of the ledger."""
    linears = [linear for site in sites for linear in site.linears]
    if context.target.provider == "cpu" and linears:
        errors = activation_error(linears, seed=context.seed)
        squares = [error * error for error in errors.values()]
        report.metrics["activation_error"] = math.sqrt(sum(squares) / len(linears))
        for row in report.ledger:
            row["activation_error"] = errors.get(row["site"], 0.0)


def plain(site: Site) -> Coded:
    """The codes of a site rounded to the nearest."""
    return Coded(*round_matrix(site.read(), **site.format._asdict(), scale_dtype=site.dtype.numpy()))


def rounded(
    sites: list[Site], context: Context, label: str, code: Callable[[Site], Coded] = plain
) -> Iterator[tuple[Site, Coded]]:
    """Sites coded without data by `code`, on a thread per core."""
    return threaded(code, sites, context, label)


def threaded(work: Callable[[Site], T], sites: list[Site], context: Context, label: str) -> Iterator[tuple[Site, T]]:
    """Every site with what `work` makes of it, on a thread per core, in the order of `sites`."""
    with _workers() as pool:
        futures: dict[int, Future[T]] = {}
        # Large matrices first: one that starts last would keep a single core busy at the end.
        for site in sorted(sites, key=lambda one: one.shape[0] * one.shape[1] < 1 << 22):
            futures[id(site)] = pool.submit(work, site)
        for site in context.track(sites, label):
            # A finished future would keep its arrays alive.
            yield site, futures.pop(id(site)).result()


def output_error(w_NK: Floats, q_NK: Floats, stats: Stats) -> float:
    """||(Q - W) X|| / ||W X|| of a matrix and its quantized form, by the second moments of what it reads."""
    moments_KK = stats.hessian_KK.astype(np.float32)
    energy = quadratic(w_NK.T, moments_KK)
    return math.sqrt(quadratic((q_NK - w_NK).T, moments_KK) / energy) if energy > 0 else 0.0


def require_text(model: ir.Model, context: Context) -> None:
    """Raises StreamingError where nothing but random tokens could be streamed, or not even those."""
    feeds(model.graph, np.zeros((1, 2), np.int64))
    if not context.calibration.is_text:
        raise StreamingError("the model has no tokenizer.json, and random tokens are no text")


def calibration_windows(
    model: ir.Model,
    wanted: list[Linear],
    site_of: dict[int, Site],
    context: Context,
    report: Report,
    tokens: int,
    length: int,
) -> list[dict[str, Any]]:
    """Inputs of the model for each window of calibration text; what was read goes to the report.

    Raises:
        UnsupportedModelError: the CPU cannot compute what some of `wanted` read.
    """
    if any(site_of[id(linear)].dtype == ir.DataType.BFLOAT16 for linear in wanted):
        raise UnsupportedModelError(
            "text is streamed on the CPU, which has no kernels for bfloat16",
            hint="use --target cuda (float16), or rtn without ledger_tokens",
        )
    ids_WS, report.calibration = context.calibration.windows(tokens, length)
    return feeds(model.graph, ids_WS)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread per core (numpy lets go of the interpreter lock); what has not begun is dropped on an error."""
    pool = ThreadPoolExecutor(workers(), thread_name_prefix="rounding")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def token_tables(embeddings: list[Embedding]) -> list[Embedding]:
    """The tables that are as wide as the largest: narrower ones are rotary caches, which must stay exact."""
    if not embeddings:
        return []
    width = max(embeddings, key=lambda one: one.num_rows * one.width).width
    return [one for one in embeddings if one.width == width]


def is_tied(embedding: Embedding) -> bool:
    """Whether the head multiplies with the very rows that are gathered."""
    head = embedding.head
    return head is not None and head.shape == (embedding.num_rows, embedding.width) and head.holder != "MatMul"


def fitting_block(width: int, block_size: int, bits: int, *, exact: bool) -> int | None:
    """The block size to use for rows of `width`: no wider than the row, and a divisor of it where that is a must.

    Elsewhere the last block is padded by at most a sixteenth of the row, unless blocks are the smallest already.
    """
    smallest = 32 if bits == 2 else 16
    block = block_size
    allowed = 0 if exact else width // 16
    while block > smallest and (block // 2 >= width or -width % block > allowed):
        block //= 2
    return None if exact and width % block else block


def _described(operator: str, chosen: Format) -> str:
    """What `node_format` says of a matrix that is stored so."""
    zeros = "" if chosen.symmetric else ", zero points"
    return f"{operator}, {chosen.bits} bits in blocks of {chosen.block_size}{zeros}"


def without_kernel(dtype: ir.DataType, context: Context) -> str | None:
    """Why nothing computes with codes and activations of this type, None when something does."""
    if dtype == ir.DataType.DOUBLE or (dtype == ir.DataType.BFLOAT16 and context.target.provider == "cpu"):
        return f"there is no kernel for {dtype.name.lower()} activations"
    return None


def dtype_of(node: ir.Node, weight: ir.Value) -> ir.DataType:
    """Float type of a weight; of codes that of their scales."""
    if formats.stored(node) is not None:
        return formats.float_type(node)
    value = node.inputs[2] if node_format(node) else weight
    return ir.DataType.FLOAT if value is None or value.const_value is None else value.const_value.dtype
