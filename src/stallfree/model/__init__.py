"""Models: configuration, weights, the decoder, the sampler. Knows no requests and no HTTP."""
