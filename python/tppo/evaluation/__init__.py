"""Figures of answers, the closing table and the token heat map."""
