"""Adapters to models of transformers: the head, shared prefixes, tokenizers of one text."""
