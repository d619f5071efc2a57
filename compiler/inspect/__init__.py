"""Graph inspection: summary of a model, its blocks, linears, bytes and operators."""
