"""Generative prior art that several chapters start from or compare with: VAE, VaDE, DCN."""
