"""Tidy tables of a set of adapters: spectra, interference, components, and the files they are written to."""
