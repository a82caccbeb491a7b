"""Weights in few bits: formats, packing, products."""
