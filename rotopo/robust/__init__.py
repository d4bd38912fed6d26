"""ROPO as a procedure (arXiv 2404.04102): noisy pairs filtered out in rounds, and sampled anew."""
