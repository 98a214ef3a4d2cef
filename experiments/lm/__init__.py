"""The parts of the language-model experiment that `train_lm.py` runs: model, data, optimizers, training, report."""
