"""Linear algebra of low-rank factors, and measures of a spectrum. Imports only torch and numpy."""
