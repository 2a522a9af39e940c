"""`tppo study`: arms trained at equal cost, seed by seed, and figures with intervals of them."""
