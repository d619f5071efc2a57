"""Replaces chains of small operators by the fused operators that ONNX Runtime has kernels for."""
