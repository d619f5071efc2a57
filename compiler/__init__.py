"""The compiler: contract of a pass, pipeline, views of the graph, artifact, reports."""
