"""Performance: benchmarks of codecs, collectives and models; tuning; estimates before there are ranks."""
