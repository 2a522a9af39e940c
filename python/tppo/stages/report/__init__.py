"""`report.html` of a run folder: what came of the run, and how, on one self-contained page."""
