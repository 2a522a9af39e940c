"""The story of a run, one stage after the other; the only room that knows paths."""
