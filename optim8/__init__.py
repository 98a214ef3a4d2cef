"""8-bit optimizers on blockwise dynamic quantization, and the functional API they stand on."""
