"""Rows of preference pairs, and DPO's loss of them written from the paper, in numpy and float64."""

import numpy as np

from mosaicjax.models import mpt
from mosaicjax.program import Phase

VOCAB, SEQ, ROWS = 32, 24, 8
SMALL = mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=VOCAB)
PHASE = Phase(SEQ, ROWS, ROWS)


def rows(number=0, count=ROWS, seq=SEQ, vocab=VOCAB):
    """Packed rows of none to three pairs each, as a stream of pairs gives them, answers masked at random."""
    rng = np.random.default_rng(number)
    batch = {
        name: np.zeros((count, seq), np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    batch["weights"] = np.zeros((count, seq), np.float32)
    batch["row"] = np.arange(count, dtype=np.int32)
    for row in range(count):
        at, segment = 0, 0
        while True:
            lengths = rng.integers(2, 7, 2)
            if at + lengths.sum() > seq or rng.random() < 0.1:
                break
            for length in lengths.tolist():
                segment += 1
                place = slice(at, at + length)
                words = rng.integers(1, vocab, length + 1)
                batch["tokens"][row, place], batch["targets"][row, place] = words[:-1], words[1:]
                batch["segments"][row, place] = segment
                batch["positions"][row, place] = np.arange(length)
                # The prompt bears none, the answer all.
                batch["weights"][row, at + rng.integers(0, length) : at + length] = 1
                at += length
    return batch


def answers(batch):
    """For each pair the places of its two answers: (row, chosen slice, rejected slice)."""
    found = []
    for row, segments in enumerate(batch["segments"]):
        for pair in range(1, segments.max() // 2 + 1):
            places = (np.flatnonzero(segments == number) for number in (2 * pair - 1, 2 * pair))
            found.append((row, *(slice(each[0], each[-1] + 1) for each in places)))
    return found


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def summed(logits, batch, row, place):
    """The log-probability of an answer: of its targets that bear loss, one after the other."""
    total = 0.0
    logs = log_softmax(logits[row, place])
    for log, target, bears in zip(
        logs, batch["targets"][row, place], batch["weights"][row, place], strict=True
    ):
        total += log[target] if bears else 0.0
    return total


def naive(logits, reference, batch, beta, smoothing=0.0):
    """The summed loss, its gradient by the logits, and what answers are worth; one pair after the other."""
    loss, grad, worths = 0.0, np.zeros(np.shape(logits)), []
    for row, *both in answers(batch):
        worth = [beta * (summed(logits, batch, row, at) - summed(reference, batch, row, at)) for at in both]
        margin = worth[0] - worth[1]
        right, wrong = 1 / (1 + np.exp(-margin)), 1 / (1 + np.exp(margin))
        loss += -(1 - smoothing) * np.log(right) - smoothing * np.log(wrong)
        # Of -log sigmoid(m) it is sigmoid(m) - 1.
        slope = (1 - smoothing) * (right - 1) + smoothing * right
        for sign, at in zip((1, -1), both, strict=True):
            softmax = np.exp(log_softmax(logits[row, at]))
            hot = np.eye(np.shape(logits)[-1])[batch["targets"][row, at]]
            grad[row, at] += slope * sign * beta * (hot - softmax) * batch["weights"][row, at][:, None]
        worths.append(worth)
    return loss, grad, np.array(worths)
