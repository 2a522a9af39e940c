"""One folder an operator: `__init__.py` the public function, `reference.py` the specification."""
