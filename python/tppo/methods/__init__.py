"""One file an algorithm: batches in, a better model out; no file and no session is known here."""
