"""Labels by hand: which answers a person is asked about, on a page or in the terminal."""
