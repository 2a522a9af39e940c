"""A trained model in use: histories in, queries out, by Python, the command line and HTTP."""
