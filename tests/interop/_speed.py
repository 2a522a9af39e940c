"""Two functions that compute the same: whose takes less of a processor, in turns in one process."""

import time

import torch

SLACK = 1.1  # what the clock of a machine in use adds to one of the two
CLOSE = 1e-5  # of the larger of 1 and the largest result: the parity tests are stricter


def with_backward(function, *leaves):
    """A call of the function that gives its tensors and the gradients of the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call():
        found = function(*leaves)
        found = [x for x in (found if isinstance(found, tuple | list) else [found])
                 if torch.is_tensor(x)]
        graded = [x for x in found if x.requires_grad]
        slopes = torch.autograd.grad(sum(x.sum() for x in graded), leaves) if graded else ()
        return [x.detach() for x in found] + list(slopes)

    return call


def compared(capsys, name, theirs, mine, *, where=None, exact=None, seconds=1.0, close=CLOSE):
    """How many times as fast ours is; no number where the results differ at valid slots by more
    than theirs from `exact`, and an error where ours is slower.  The shortest processor time of
    either counts, of seven calls and more."""
    stock = theirs()
    for truth, a, b in zip(stock if exact is None else exact, stock, mine(), strict=True):
        truth, a, b = (x[where > 0] if where is not None and x.shape == where.shape else x
                       for x in (truth.double(), a.double(), b.double()))
        bound = close * truth.abs().max().clamp(min=1) + (a - truth).abs().max()
        assert (b - truth).abs().max() <= bound, name
    found = ([], [])
    until = time.perf_counter() + seconds
    while len(found[0]) < 7 or time.perf_counter() < until:
        for times, function in zip(found, (theirs, mine), strict=True):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    stock, ours = map(min, found)
    with capsys.disabled():
        print(f"\n{name}: {1e3 * stock:.3f} ms theirs, {1e3 * ours:.3f} ms ours, "
              f"{stock / ours:.2f} times as fast")
    assert ours <= SLACK * stock
    return stock / ours
