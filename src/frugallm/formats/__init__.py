"""How compressed models lie on disk, and what loads them."""
