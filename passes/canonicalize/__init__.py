"""Makes graphs of different exporters alike, without changing a single output bit."""
