"""Why the figures are our own: a bootstrap replicate as weights against one by scikit-learn, and
the time and memory of the bootstrap for many classes."""

import tracemalloc

import numpy as np
from common import timed
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss

from finetune_nb.evaluation.metrics import bootstrap
from finetune_nb.evaluation.prediction import softmax


def made(n, classes, seed=0):
    """Logits [n, classes] float32 and labels that agree with them more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 2
    return logits, labels


def by_scikit_learn(logits, labels, replicates):
    """The same figures but the calibration error, which scikit-learn has not, on drawn rows."""
    rng, guess, chances = np.random.default_rng(0), logits.argmax(1), softmax(logits)
    everything = np.arange(logits.shape[1])
    for _ in range(replicates):
        rows = rng.integers(0, len(labels), len(labels))
        accuracy_score(labels[rows], guess[rows])
        balanced_accuracy_score(labels[rows], guess[rows])
        f1_score(labels[rows], guess[rows], average="macro", zero_division=0)
        log_loss(labels[rows], chances[rows], labels=everything)


def ratio(n, classes, replicates, theirs):
    """Milliseconds a replicate, ours and theirs, and how often ours goes into theirs."""
    logits, labels = made(n, classes)
    ours = timed(lambda: bootstrap(logits, labels, replicates)) / replicates
    plain = timed(lambda: by_scikit_learn(logits, labels, theirs)) / theirs
    print(
        f"N = {n:6,}, K = {classes:5,}: a replicate takes {1e3 * ours:8.3f} ms ours, "
        f"{1e3 * plain:8.2f} ms scikit-learn, ratio {plain / ours:,.0f}",
        flush=True,
    )


def memory():
    """What the bootstrap of 1,000 classes takes."""
    logits, labels = made(10_000, 1000)
    seconds = timed(lambda: bootstrap(logits, labels, replicates=100))
    tracemalloc.start()
    bootstrap(logits, labels, replicates=100)
    more = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"N = 10,000, K = 1,000, 100 replicates: {seconds:.1f} s, {more:.0f} MB more")


if __name__ == "__main__":
    memory()
    ratio(150, 2, 1000, 50)
    ratio(1000, 10, 1000, 30)
    ratio(10_000, 100, 200, 5)
