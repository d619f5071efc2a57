"""How many threads work."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import pytest
from decoders import write_decoder
from threadpoolctl import threadpool_info

import onnxpress
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.threads import limited, session_threads, workers
from onnxpress.passes.quantization import _weight_only


def _blas() -> set[int]:
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def test_a_limit_lasts_as_long_as_its_block_even_when_that_fails() -> None:
    before = workers(), session_threads(), _blas()

    def fail() -> None:
        with limited(1):
            assert (workers(), session_threads(), _blas()) == (1, 1, {1})
            with limited(3):  # the smallest holds
                assert workers() == 1
            with limited(None):
                assert workers() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (workers(), session_threads(), _blas()) == before


def test_limits_of_two_threads_end_apart() -> None:
    before = workers(), session_threads(), _blas()
    first, second = limited(1), limited(2)
    first.__enter__()
    second.__enter__()
    assert workers() == 1
    first.__exit__(None, None, None)
    assert (workers(), _blas()) == (2, {2})
    second.__exit__(None, None, None)
    assert (workers(), session_threads(), _blas()) == before


def test_no_limit_leaves_the_choice() -> None:
    with limited(None):
        assert workers() >= 1
        assert session_threads() == 0


def test_all_that_optimize_opens_keeps_the_limit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_decoder(tmp_path / "model")
    sizes: list[int] = []
    opened: set[int] = set()
    pool, session = _weight_only.ThreadPoolExecutor, ort.InferenceSession

    def counted(count: int, **others: Any) -> Any:
        sizes.append(count)
        return pool(count, **others)

    def watched(content: Any, options: ort.SessionOptions, *rest: Any, **others: Any) -> Any:
        opened.add(options.intra_op_num_threads)
        return session(content, options, *rest, **others)

    monkeypatch.setattr(_weight_only, "ThreadPoolExecutor", counted)
    monkeypatch.setattr(ort, "InferenceSession", watched)
    passes = "gptq(bits=4, tokens=64, length=32, head_bits=8), rtn(bits=8)"
    onnxpress.optimize(tmp_path / "model", output=tmp_path / "out", passes=passes, calibration="english", workers=1)
    assert sizes
    assert set(sizes) == {1}
    assert opened == {1}


def test_no_thread_at_all_is_refused(tmp_path: Any) -> None:
    with pytest.raises(OptionError, match="workers: expected at least 1, got 0"):
        onnxpress.optimize("smollm2-135m", output=tmp_path / "out", workers=0)
