"""Times of the custom kernels, of the MLX operations they replace, and of whole training steps.

    python benchmarks/gpu_kernels.py [batch] [d] [n_features] [k]

Needs CUDA. Times are medians; the steps are interleaved. The first run compiles for some minutes.
The dense steps take numbers of features that are multiples of 2048.
"""

import statistics
import sys
import time

import mlx.core as mx

from mlxterp.sae import gpu_kernels as kernels

REPEATS, ROUNDS = 20, 5


def measure(name, operation, work=None, unit="GB/s", repeats=REPEATS):
    """Print the time of one `operation`, of which `repeats` are in flight together."""
    try:
        mx.eval(operation())
        times = []
        for _ in range(ROUNDS):
            mx.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                mx.async_eval(operation())
            mx.synchronize()
            times.append((time.perf_counter() - start) / repeats)
    except (RuntimeError, ValueError) as error:
        print(f"{name:44s} failed: {str(error)[:300]}", flush=True)
        return
    seconds = statistics.median(times)
    rate = f"{work / seconds / 1e9:9.0f} {unit}" if work else ""
    print(f"{name:44s} {seconds * 1e3:9.3f} ms {rate}", flush=True)


def group_top_k(pre, k):
    """Exact top-k from plain operations: the entries of the k strided groups of largest maxima."""
    batch, n = pre.shape
    groups = 2048
    maxima = pre.reshape(batch, -1, groups).max(axis=1)
    best = mx.argpartition(maxima, groups - k, axis=-1)[:, groups - k :]
    candidates = (mx.arange(n // groups)[None, :, None] * groups + best[:, None]).reshape(batch, -1)
    entries = mx.take_along_axis(pre, candidates, axis=-1)
    chosen = mx.argpartition(entries, entries.shape[1] - k, axis=-1)[:, entries.shape[1] - k :]
    return mx.take_along_axis(candidates, chosen, axis=-1)


def update(params, m, v, gradients, squares, t, custom):
    """Clip by the norm, Adam, decoder rows of unit norm."""
    norm = mx.sqrt(sum(squares))
    good, factor = mx.isfinite(norm), mx.minimum(1.0 / (norm + 1e-12), 1.0)
    rate, root = 1e-4 / (1 - mx.power(0.9, t)), mx.rsqrt(1 - mx.power(0.999, t))
    new = {}
    for name, p in params.items():
        arrays = (p, m[name], v[name], gradients[name])
        if custom:
            function = kernels.adam_unit_rows if name == "W_dec" else kernels.adam
            new[name] = function(*arrays, rate, root, factor, good)
            continue
        g = gradients[name] * factor
        m_new = m[name] + 0.1 * (g - m[name])
        v_new = v[name] + 0.001 * (g.square() - v[name])
        p_new = p - rate * m_new / (mx.sqrt(v_new) * root + 1e-8)
        if name == "W_dec":
            p_new = p_new / mx.linalg.norm(p_new, axis=-1, keepdims=True)
        new[name] = [
            mx.where(good, a, b) for a, b in zip((p_new, m_new, v_new), arrays, strict=False)
        ]
    return [{name: part[i] for name, part in new.items()} for i in range(3)]


def step(state, x, k, custom, dtype):
    """One TopK training step, with the custom kernels or with dense products."""
    params, m, v, t, fired = state
    batch, n_features = x.shape[0], params["b_enc"].size
    low_x, W_enc, W_dec = (a.astype(dtype) for a in (x, params["W_enc"], params["W_dec"]))
    pre = mx.addmm(params["b_enc"].astype(dtype), low_x, W_enc.T)
    indices = (kernels.top_k if custom else group_top_k)(pre, k)
    raw = mx.take_along_axis(pre, indices, axis=-1).astype(mx.float32)
    values = mx.maximum(raw, 0)
    if custom:
        features, flat = indices.reshape(-1), values.reshape(-1)
        rows = mx.arange(batch * k, dtype=mx.uint32) // k
        starts = mx.arange(batch + 1, dtype=mx.uint32) * k
        y = kernels.decode(flat, features, starts, W_dec)
    else:
        z = mx.put_along_axis(mx.zeros(pre.shape, dtype), indices, values.astype(dtype), axis=-1)
        y = z @ W_dec
    error = y + params["b_dec"] - x
    g = error * (2 / batch)
    if custom:
        d_raw = mx.where(raw.reshape(-1) > 0, kernels.dots(rows, features, g, W_dec), 0)
        order, by_feature = kernels.sort_pairs(features, n_features)
        W_enc_gradient = kernels.row_sums(order, by_feature, d_raw, rows, low_x)
        W_dec_gradient = kernels.row_sums(order, by_feature, flat, rows, g)
        ones = mx.ones((batch, 1))
        b_enc_gradient = kernels.row_sums(order, by_feature, d_raw, rows, ones)[:, 0]
        squares = [
            kernels.row_squares(W_enc_gradient).sum(),
            kernels.row_squares(W_dec_gradient, params["W_dec"]).sum(),
        ]
    else:
        low_g = g.astype(dtype)
        dots = mx.take_along_axis(low_g @ W_dec.T, indices, axis=-1).astype(mx.float32)
        d_raw = mx.where(raw > 0, dots, 0)
        z_gradient = mx.put_along_axis(mx.zeros_like(z), indices, d_raw.astype(dtype), axis=-1)
        W_enc_gradient = (z_gradient.T @ low_x).astype(mx.float32)
        W_dec_gradient = (z.T @ low_g).astype(mx.float32)
        along = (W_dec_gradient * params["W_dec"]).sum(axis=-1, keepdims=True)
        W_dec_gradient = W_dec_gradient - along * params["W_dec"]
        b_enc_gradient = mx.zeros((n_features,)).at[indices.reshape(-1)].add(d_raw.reshape(-1))
        squares = [W_enc_gradient.square().sum(), W_dec_gradient.square().sum()]
    gradients = {"W_enc": W_enc_gradient, "b_enc": b_enc_gradient, "W_dec": W_dec_gradient}
    gradients["b_dec"] = g.sum(axis=0)
    squares += [gradients["b_enc"].square().sum(), gradients["b_dec"].square().sum()]
    new = update(params, m, v, gradients, squares, t + 1, custom)
    fired = fired.at[indices.reshape(-1)].add((values > 0).astype(mx.float32).reshape(-1))
    return [*new, t + 1, fired], error.square().sum() / batch


def initial_state(d, n_features):
    W = mx.random.normal((n_features, d), key=mx.random.key(0))
    W = W / mx.linalg.norm(W, axis=-1, keepdims=True)
    params = {"W_enc": W, "b_enc": mx.zeros((n_features,)), "W_dec": W + 0, "b_dec": mx.zeros((d,))}
    m, v = ({name: mx.zeros_like(p) for name, p in params.items()} for _ in range(2))
    return [params, m, v, mx.array(0.0), mx.zeros((n_features,))]


def measure_operations(batch, d, n_features, k):
    """The rates that decide between the forms of the step."""
    x, W = mx.random.normal((batch, d)), mx.random.normal((n_features, d))
    flops, gathered = 2 * batch * d * n_features, batch * k * d * 4
    for dtype in (mx.float32, mx.bfloat16):
        a, b = x.astype(dtype), W.astype(dtype)
        z = mx.random.normal((batch, n_features)).astype(dtype)
        mx.eval(a, b, z)
        measure(f"x @ W.T {dtype}", lambda a=a, b=b: a @ b.T, flops / 1e3, "TFLOP/s")
        measure(f"z.T @ x {dtype}", lambda a=a, z=z: z.T @ a, flops / 1e3, "TFLOP/s")
    pre = x @ W.T / d**0.5
    indices = group_top_k(pre, k)
    values = mx.take_along_axis(pre, indices, axis=-1)
    mx.eval(pre, indices, values)
    measure("copy", lambda: pre + 1, 2 * pre.nbytes)
    measure("argpartition", lambda: mx.argpartition(pre, k, axis=-1), pre.size, "G/s", 2)
    measure("group top-k", lambda: group_top_k(pre, k), pre.size, "G/s")
    measure("scatter the code", lambda: mx.put_along_axis(mx.zeros_like(pre), indices, values, -1))
    measure("W[indices]", lambda: W[indices], 2 * gathered, repeats=2)
    flat, rows = indices.reshape(-1), mx.repeat(mx.arange(batch), k)
    terms = x[rows] * values.reshape(-1, 1)
    order, starts = kernels.sort_pairs(flat, n_features)
    by_feature, terms_by_feature = values.reshape(1, -1)[:, order], x[rows[order]]
    segments = mx.stack([starts[:-1], starts[1:]], axis=-1)
    mx.eval(terms, by_feature, terms_by_feature, segments)
    zeros = mx.zeros((n_features, d))
    measure("scatter-add", lambda: zeros.at[flat].add(terms), terms.size, "G/s", 1)
    measure(
        "segmented_mm",
        lambda: mx.segmented_mm(by_feature, terms_by_feature, segments),
        2 * terms.size,
        "GFLOP/s",
        1,
    )


def measure_kernels(batch, d, n_features, k, dtype):
    """Each kernel alone; the bytes are those it must at least ask for."""
    x, W = mx.random.normal((batch, d)), mx.random.normal((n_features, d))
    low_x, low_W = x.astype(dtype), W.astype(dtype)
    pre = (low_x @ low_W.T) / d**0.5
    features = kernels.top_k(pre, k).reshape(-1)
    values = mx.random.normal((batch * k,))
    rows = mx.arange(batch * k, dtype=mx.uint32) // k
    starts = mx.arange(batch + 1, dtype=mx.uint32) * k
    order, by_feature = kernels.sort_pairs(features, n_features)
    mx.eval(low_x, low_W, pre, features, values, rows, starts, order, by_feature)
    gathered, matrix = batch * k * d * low_W.itemsize, n_features * d * 4
    measure("top_k", lambda: kernels.top_k(pre, k), pre.nbytes)
    measure("decode", lambda: kernels.decode(values, features, starts, low_W), gathered)
    measure("dots", lambda: kernels.dots(rows, features, x, low_W), gathered)
    measure("sort_pairs", lambda: kernels.sort_pairs(features, n_features))
    measure("  argsort alone", lambda: mx.argsort(features))
    measure(
        "row_sums",
        lambda: kernels.row_sums(order, by_feature, values, rows, low_x),
        gathered + matrix,
    )
    ones = mx.ones((batch, 1))
    measure("row_sums, one column", lambda: kernels.row_sums(order, by_feature, values, rows, ones))
    if dtype != mx.float32:
        return
    g, m, v = (mx.random.normal((n_features, d)) for _ in range(3))
    one = mx.array(1.0)
    mx.eval(g, m, v)
    measure("row_squares", lambda: kernels.row_squares(g), matrix)
    measure("row_squares, projected", lambda: kernels.row_squares(g, W), 2 * matrix)
    for function in (kernels.adam, kernels.adam_unit_rows):
        measure(
            function.__name__,
            lambda f=function: f(W, m, v, g, one, one, one),
            7 * matrix,
            repeats=4,
        )


def measure_steps(batch, d, n_features, k, steps=8):
    """Whole steps, interleaved."""
    x = mx.random.normal((batch, d)) + mx.random.normal((d,))
    names = {
        f"{'kernels' if custom else 'dense'} {dtype}": (custom, dtype)
        for dtype in (mx.float32, mx.bfloat16)
        for custom in (True, False)
    }
    states = {name: initial_state(d, n_features) for name in names}
    functions = {
        name: mx.compile(lambda state, x, c=custom, t=dtype: step(state, x, k, c, t))
        for name, (custom, dtype) in names.items()
    }
    times = {name: [] for name in names}
    losses = {name: [] for name in names}
    for round_ in range(ROUNDS + 1):
        for name, function in functions.items():
            mx.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                states[name], loss = function(states[name], x)
                mx.async_eval(states[name], loss)
            mx.synchronize()
            losses[name].append(loss.item())
            if round_:
                times[name].append((time.perf_counter() - start) / steps)
    for name in names:
        seconds = statistics.median(times[name])
        print(
            f"step, {name:30s} {seconds * 1e3:9.3f} ms "
            f"({min(times[name]) * 1e3:.3f} to {max(times[name]) * 1e3:.3f}) "
            f"{batch / seconds / 1e6:6.3f} M tokens/s, loss {losses[name][0]:.5f} "
            f"-> {losses[name][-1]:.5f}",
            flush=True,
        )


def main():
    if not kernels.available():
        print("The custom kernels need CUDA.")
        return
    sizes = [int(size) for size in sys.argv[1:5]]
    batch, d, n_features, k = [*sizes, *(2048, 2048, 32768, 100)[len(sizes) :]]
    print(f"batch {batch}, d {d}, {n_features} features, k {k}, MLX {mx.__version__}")
    measure_operations(batch, d, n_features, k)
    for dtype in (mx.float32, mx.bfloat16):
        print(dtype)
        measure_kernels(batch, d, n_features, k, dtype)
    measure_steps(batch, d, n_features, k)


if __name__ == "__main__":
    main()
