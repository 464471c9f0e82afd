"""Methods that act while a model answers: their contract, one file per method, and what their claims measure with."""
