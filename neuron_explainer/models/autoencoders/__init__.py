"""The parts of an autoencoder: nonlinearities, sparse latents, FISTA, conversion."""
