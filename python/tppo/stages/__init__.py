"""The stages of a run, one file each; the only folder whose code knows paths."""
