"""Runs an artifact on ONNX Runtime: session, generation, evaluation, benchmark, placement."""
