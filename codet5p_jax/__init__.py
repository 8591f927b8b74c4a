"""CodeT5+ for TPUs: encoder-decoder language models of code in JAX."""

__version__ = '0.1.0'
