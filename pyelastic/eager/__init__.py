"""The executable specifications: plain torch, float64 in gives float64 out."""
