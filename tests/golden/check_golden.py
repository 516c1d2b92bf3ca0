"""Check the golden files against `formulas.py`: losses, gradients, estimators, updates, margins.

    python tests/golden/check_golden.py

Needs numpy only. Gradients are compared with central finite differences of the formulas in
float64, with everything that the library detaches held still. The exit status is 1 if a deviation
is above its bound.
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path

import formulas as f
import numpy as np

FOLDER = Path(__file__).parent
STEP = 1e-6
WIDTHS = [4, 12, 32]
CORE = ("W_enc", "b_enc", "W_dec", "b_dec")
log = logging.getLogger("golden")


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}


INPUTS = {n: a if a.dtype == bool else a.astype(np.float64) for n, a in load("inputs")[0].items()}
X = INPUTS["x"][0]


def parameters(names, decoder="W_dec"):
    return {n: INPUTS[decoder if n == "W_dec" else n].copy() for n in names}


def deviation(found, expected):
    """The largest difference, relative to the largest entry."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def stored(arrays, prefix, names):
    """The arrays of that prefix that the file holds, with their bare names."""
    return [(n, arrays[prefix + n]) for n in names if prefix + n in arrays]


def shown(found):
    return "  ".join(f"{name} {value:.0e}" for name, value in found.items())


def finite_difference(loss, p, name):
    """Central differences of `loss(p)["loss"]`, entry by entry."""
    gradient, flat = np.zeros(p[name].size), p[name].reshape(-1)
    for i, value in enumerate(flat.copy()):
        flat[i] = value + STEP
        above = loss(p)["loss"]
        flat[i] = value - STEP
        below = loss(p)["loss"]
        flat[i] = value
        gradient[i] = (above - below) / (2 * STEP)
    return gradient.reshape(p[name].shape)


def cases():
    """(file, case, names of the parameters, formula taking (p, x) and perhaps at, skip)."""
    core, dead = CORE, INPUTS["dead"]
    topk = {"plain": {}, "centred": {"centred": True}, "aux": {"dead": dead}}
    for case, options in (topk | {"aux_few": {"dead": INPUTS["few_dead"]}}).items():
        yield "saelens_topk", case, core, partial(f.saelens_topk, k=4, **options), ()
    for case, options in {"plain": {}, "aux": {"dead": dead}}.items():
        formula = partial(f.saelens_topk, k=4, code="batchtopk", **options)
        yield "saelens_batchtopk", case, core, formula, ()
    level = {"dead": dead, "level_aux": True}
    for case, options in {"plain": {}, "aux": {"dead": dead}, "level_aux": level}.items():
        formula = partial(f.saelens_matryoshka, k=4, widths=WIDTHS, **options)
        yield "saelens_matryoshka", case, core, formula, ()
    for case, options in JUMPRELU.items():
        options = {n: v for n, v in options.items() if n not in ("bandwidth", "ste")}
        skip = ("threshold", "W_enc", "b_enc") if JUMPRELU[case].get("ste") else ("threshold",)
        names = (*core, "threshold")
        yield "saelens_jumprelu", case, names, partial(f.saelens_jumprelu, **options), skip
    gated = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    for case in ("unit", "norms"):
        yield "saelens_gated", case, gated, partial(f.saelens_gated, coefficient=0.4), ()
        yield "saelens_standard", case, core, partial(f.saelens_standard, coefficient=0.4), ()
    for code in ("topk", "batchtopk"):
        yield f"dl_{code}", "aux", core, partial(f.dl_topk, k=4, dead=dead, code=code), ()
    for case, weights in {"aux": [1 / 3] * 3, "weighted": [0.5, 0.25, 0.25]}.items():
        formula = partial(f.dl_matryoshka, k=4, widths=WIDTHS, weights=weights, dead=dead)
        yield "dl_matryoshka", case, core, formula, ()
    formula = partial(f.dl_jumprelu, coefficient=0.7, target=5.0)
    yield "dl_jumprelu", "loss", (*core, "threshold"), formula, ("threshold",)
    yield "dl_gated", "loss", gated, partial(f.dl_gated, coefficient=0.4), ()
    for case, options in {"autoencoder": (True, 1), "new": (False, 2)}.items():
        centred, power = options
        formula = partial(f.dl_standard, coefficient=0.4, centred=centred, power=power)
        yield "dl_standard", case, core, formula, ()


JUMPRELU = {
    case: {"coefficient": 0.3, "bandwidth": 0.5} | options
    for case, options in {
        "step": {"mode": "step"},
        "quadratic": {"mode": "quadratic", "target": 6.0},
        "tanh": {"mode": "tanh"},
        "step_to_input": {"mode": "step", "ste": True},
        "anthropic": {"mode": "tanh", "ste": True, "pre_act": 0.01, "dead": INPUTS["dead"]},
    }.items()
}
DETACHES = ("topk", "batchtopk", "matryoshka", "dl_gated")


def check_case(name, case, names, formula, skip):
    """Deviation of the losses and of each gradient that has a finite difference."""
    arrays, meta = load(name)
    meta = meta["cases"][case]
    p = parameters(names, meta["decoder"])
    terms = formula(p, X)
    assert set(terms) >= set(meta["losses"]), (name, case, set(meta["losses"]) - set(terms))
    losses = max(abs(terms[n] / v - 1) if v else abs(terms[n]) for n, v in meta["losses"].items())
    more = {"at": {n: a.copy() for n, a in p.items()}} if name.endswith(DETACHES) else {}
    found = {
        n: deviation(finite_difference(partial(formula, x=X, **more), p, n), gradient)
        for n, gradient in stored(arrays, f"{case}/grad_", names)
        if n not in skip
    }
    log.info("%-20s %-14s loss %.0e  %s", name, case, losses, shown(found))
    # dictionary_learning computes the auxiliary loss and L0 in float32
    bound = 5e-7 if name.startswith("dl") else 1e-12
    return losses < bound and all(v < 2e-7 for v in found.values())


def check_estimators():
    """The straight-through gradients against their written formulas."""
    arrays, meta = load("saelens_jumprelu")
    good = []
    for case, options in JUMPRELU.items():
        p = parameters((*CORE, "threshold"), meta["cases"][case]["decoder"])
        expected = f.saelens_jumprelu_gradients(p, X, **options)
        kept = stored(arrays, f"{case}/grad_", expected)
        found = {n: deviation(expected[n], gradient) for n, gradient in kept}
        log.info("estimator %-14s %s", case, shown(found))
        good.append(max(found.values()) < 2e-7)
    arrays, meta = load("dl_jumprelu")
    p = parameters((*CORE, "threshold"))
    gradient = f.dl_jumprelu_threshold_gradient(p, X, coefficient=0.7, target=5.0, bandwidth=0.5)
    found = deviation(gradient, arrays["loss/grad_threshold"])
    log.info("estimator dl_jumprelu threshold %.0e", found)
    return all(good) and found < 5e-7


def dl_gradients(p, x, code, dead, alpha=1 / 32):
    """Analytic gradients of `dl_topk`, and the code."""
    pre = f.pre_activations(p, x, centred=True)
    z = f.CODES[code](pre, 4)
    z_dead = np.where(dead, f.keep_largest(np.where(dead, f.relu(pre), -1), 4), 0)
    residual = x - f.decode(z, p)
    variance = ((residual - residual.mean(axis=0)) ** 2).sum()
    d_x, d_aux = -2 * residual / len(x), 2 * alpha * (z_dead @ p["W_dec"] - residual) / variance
    d_pre = (d_x @ p["W_dec"].T) * (z > 0) + (d_aux @ p["W_dec"].T) * (z_dead > 0)
    gradients = {"W_enc": d_pre.T @ (x - p["b_dec"]), "b_enc": d_pre.sum(axis=0)}
    gradients["W_dec"] = z.T @ d_x + z_dead.T @ d_aux
    gradients["b_dec"] = d_x.sum(axis=0) - gradients["b_enc"] @ p["W_enc"]
    return gradients, z


def update(p, gradients, m, v, t, rate=0.01):
    """Project, clip, Adam, renormalise, all in place."""
    rows = p["W_dec"] / (np.linalg.norm(p["W_dec"], axis=1, keepdims=True) + 1e-6)
    gradients["W_dec"] -= (gradients["W_dec"] * rows).sum(axis=1, keepdims=True) * rows
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    for n, g in gradients.items():
        g = g * min(1, 1 / (norm + 1e-6))
        m[n] = 0.9 * m[n] + 0.1 * g
        v[n] = 0.999 * v[n] + 0.001 * g**2
        p[n] -= rate * (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.999**t)) + 1e-8)
    p["W_dec"] /= np.linalg.norm(p["W_dec"], axis=1, keepdims=True) + np.finfo(np.float64).eps
    return norm


def check_updates():
    good = []
    for code in ("topk", "batchtopk"):
        arrays, meta = load(f"dl_{code}")
        meta, p = meta["cases"]["update"], parameters(CORE)
        m, v = ({n: np.zeros_like(a) for n, a in p.items()} for _ in range(2))
        threshold = meta["threshold_before"]
        for t, x in enumerate(INPUTS["x"], start=1):
            gradients, z = dl_gradients(p, x, code, INPUTS["dead"])
            assert not (z[:, INPUTS["dead"]] > 0).any()
            smallest = np.where(z > 0, z, np.inf)
            smallest = smallest.min(axis=1).mean() if code == "topk" else smallest.min()
            threshold = 0.9 * threshold + 0.1 * smallest
            norm = update(p, gradients, m, v, t)
            kept = stored(arrays, f"update/after_{t}/", p)
            found = {n: np.abs(p[n] - after).max() for n, after in kept}
            found["threshold"] = abs(threshold - meta["thresholds"][t - 1])
            log.info("update %-10s %d  gradient norm %.3f  %s", code, t, norm, shown(found))
            good.append(max(found.values()) < 1e-6)
    _, meta = load("saelens_batchtopk")
    z = f.batch_topk_code(f.pre_activations(parameters(("W_enc", "b_enc", "b_dec")), X), 4)
    for case in meta["cases"].values():
        after = 0.99 * case["threshold_before"] + 0.01 * z[z > 0].min()
        good.append(abs(after - case["threshold_after"]) < 1e-12)
    return all(good)


def margins():
    """How far the nearest comparison is from tipping: a float32 step must choose the same."""

    def gap(values, k):
        ordered = np.sort(values, axis=-1)
        return (ordered[..., -k] - ordered[..., -k - 1]).min()

    p, found = parameters(INPUTS), {}
    for centred in (False, True):
        pre = f.pre_activations(p, X, centred)
        found[f"top {centred}"] = gap(pre, 4)
        found[f"batch {centred}"] = gap(f.relu(pre).reshape(-1), 96)
        found[f"zero {centred}"] = np.abs(pre).min()
        found[f"dead {centred}"] = gap(pre[:, INPUTS["dead"]], 4)
        pi = f.pre_activations(p, X, centred, bias="b_gate")
        found[f"gate {centred}"] = np.abs(pi).min()
        linear = pi - p["b_gate"]
        found[f"magnitude {centred}"] = np.abs(np.exp(p["r_mag"]) * linear + p["b_mag"]).min()
    pre = f.pre_activations(p, X)
    found["threshold"] = np.abs(pre - p["threshold"]).min()
    found["window"] = np.abs(np.abs(pre - p["threshold"]) - 0.25).min()
    found["window of zeros"] = np.abs(p["threshold"] - 0.25).min()
    log.info("margins  %s", shown(found))
    return min(found.values()) > 5e-5


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    good = [check_case(*case) for case in cases()]
    good += [check_estimators(), check_updates(), margins()]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
