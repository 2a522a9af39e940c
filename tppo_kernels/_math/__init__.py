"""Plain PyTorch that the references share: sequences, rows, chunks, layouts."""
