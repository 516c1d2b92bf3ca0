"""How good a coder is: fidelity, sparsity, and what the language model loses with it."""
