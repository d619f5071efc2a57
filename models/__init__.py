"""Front ends: whatever the user has (Hugging Face, GGUF, ONNX) becomes a `Source`."""
