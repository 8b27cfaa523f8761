"""What a bundle remembers beside the network: plain classifiers of the same cells, and what training saw of them."""
