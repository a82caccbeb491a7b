"""Benchmarks: of codecs, of collectives, of whole models."""
