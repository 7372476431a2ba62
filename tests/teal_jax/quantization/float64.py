"""The formats once more, in float64 numpy, weight by weight."""

import numpy as np


def bfloat16(x):
    import ml_dtypes

    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def unpack(weight):
    """Codes of a QuantizedWeight as int64 [d_in, d_out], read byte by byte."""
    codes = np.asarray(weight.codes)
    if weight.bits != 4:
        return codes.astype(np.int64)
    out = np.zeros((codes.shape[0], 2 * codes.shape[1]), np.int64)
    out[:, 0::2], out[:, 1::2] = codes % 16, codes // 16
    return out


def dequantize(weight):
    """W float64 [d_in, d_out] from codes, scales and zeros."""
    codes, scale = unpack(weight), np.asarray(weight.scale).astype(np.float64)
    if weight.group is None:
        return codes * scale
    zero = np.full(scale.shape, 2 ** (weight.bits - 1)) if weight.zero is None else np.asarray(weight.zero, np.int64)
    spread = lambda x: np.repeat(x, weight.group, axis=1)  # noqa: E731
    return (codes - spread(zero)) * spread(scale)


def round_to_nearest(w, bits, group, symmetric):
    """W float64 [d_in, d_out] moved to the nearest points of the grid, group by group."""
    w = np.asarray(w, np.float64)
    half, out = 2 ** (bits - 1), np.zeros_like(w)
    blocks = (
        [(slice(None), slice(j, j + 1)) for j in range(w.shape[1])]
        if group is None
        else [(slice(i, i + 1), slice(j, j + group)) for i in range(len(w)) for j in range(0, w.shape[1], group)]
    )
    for block in blocks:
        v = w[block]
        if symmetric:
            scale, zero = -v.flat[np.abs(v).argmax()] / half, 0
            lowest, highest = -half, half - 1
        else:
            low, high = min(v.min(), 0), max(v.max(), 0)
            scale = (high - low) / (2 * half - 1)
            lowest, highest = 0, 2 * half - 1
        scale = np.float32(scale) if group is None else bfloat16(scale)
        if scale == 0:
            continue
        if not symmetric:
            zero = np.clip(np.round(-low / scale), 0, highest)
        out[block] = (np.clip(np.round(v / scale) + zero, lowest, highest) - zero) * scale
    return out


def gptq(w, moment, bits, group, symmetric, damping=0.01):
    """Optimal brain quantisation of one row after another, the inverse Hessian shrunk by elimination: O(d^4), plain."""
    w, h = np.array(w, np.float64), np.array(moment, np.float64)
    dead = np.diag(h) <= 0
    h[dead], h[:, dead] = 0, 0
    h /= np.diag(np.asarray(moment, np.float64)).mean()
    h += np.diag(np.where(dead, 1, damping))
    columns = None
    if group is None:
        columns = np.array([np.float32(-v[np.abs(v).argmax()] / 2 ** (bits - 1)) for v in w.T], np.float64)
        columns[columns == 0] = 1
    out, left = np.zeros_like(w), list(np.argsort(-np.diag(moment), kind="stable"))
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        i, rest = left[0], left[1:]
        if group is None:
            out[i] = np.clip(np.round(w[i] / columns), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * columns
        else:
            out[i] = round_to_nearest(w[i][None], bits, group, symmetric)[0]
        w[rest] -= np.outer(inverse[0, 1:], (w[i] - out[i]) / inverse[0, 0])
        left = rest
    return out
