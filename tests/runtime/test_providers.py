"""The provider is tried, not believed."""

from __future__ import annotations

import logging

import pytest

from onnxpress.compiler.errors import OptionError, ProviderError
from onnxpress.runtime import providers

needs_no_cuda = pytest.mark.skipif(providers.cuda_obstacle() is None, reason="CUDA works here")


def test_the_cpu_is_always_there():
    choice = providers.choose("cpu")
    assert (choice.provider, choice.providers) == ("cpu", (providers.CPU,))


@needs_no_cuda
def test_without_cuda_the_reason_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        choice = providers.choose("cuda")
    assert choice.provider == "cpu"
    assert choice.reason in caplog.text
    assert providers.choose("auto").reason == choice.reason


@needs_no_cuda
def test_strict_fails_where_cuda_was_asked_for_and_only_there():
    with pytest.raises(ProviderError, match="CUDA"):
        providers.choose("cuda", strict=True)
    assert providers.choose("auto", strict=True).provider == "cpu"


def test_a_working_cuda_is_taken(monkeypatch):
    monkeypatch.setattr(providers, "cuda_obstacle", lambda: None)
    assert providers.choose("auto").providers == (providers.CUDA, providers.CPU)
    assert providers.choose("cpu").provider == "cpu"


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(providers, "_opens", lambda library: "cublas" not in library)
    assert all("cublas" in name for name in providers.missing_cuda_libraries())
    assert providers.missing_cuda_libraries()


def test_a_mistyped_policy_gets_a_hint():
    with pytest.raises(OptionError, match="did you mean 'cuda'"):
        providers.choose("cuba")


def test_the_facts_for_doctor_are_plain(monkeypatch):
    monkeypatch.setattr(providers, "_STREAM_SECONDS", 0.02)
    monkeypatch.setattr(providers, "_STREAM_BYTES", 1 << 20)
    providers.memory_bandwidth.cache_clear()
    facts = providers.explain()
    providers.memory_bandwidth.cache_clear()
    assert facts["cores"] >= 1
    assert facts["memory_bandwidth_bytes_per_s"] > 1e6
    assert facts["cuda_usable"] is (facts["provider"] == "cuda")
    assert facts["cuda_reason"]
