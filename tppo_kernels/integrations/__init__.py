"""Adapters to trainers that people already run: one file a trainer, imported only by its users.

Each file states which versions of its trainer it knows, what `patch()` puts in place of the
trainer's own functions, and how their semantics differ from ours; `unpatch()` puts them back.
"""
