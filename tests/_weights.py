"""Random models whose outputs depend on everything they read, for tests of masks and padding."""

import torch


def enlarged(model, std=0.3):
    """The model with every matrix from N(0, std^2), in torch's global random state.

    As transformers initialises them, a small model's log-probs hardly depend on what stands before
    a token: a test with a tolerance would not see padding or other answers that it attends to.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model
