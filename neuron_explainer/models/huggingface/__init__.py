"""Causal language models of `transformers` behind the same hooks as our own."""
