"""Training: the contract of methods that act while a model learns, and the job that trains with them."""
