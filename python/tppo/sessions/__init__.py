"""Logs become sessions: readers, generated sessions, splits, duplicates, inspection."""
