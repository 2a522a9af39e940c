"""What every operator is built from: argument checks, raw ops, and the choice of backend."""
