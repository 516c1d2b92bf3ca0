"""The losses of SAELens and dictionary_learning in plain numpy, as read in their source.

Each function takes parameters `p` (`W_enc [F, d]`, `b_enc [F]`, `W_dec [F, d]`, `b_dec [d]`, ...)
and a batch `x [B, d]` and returns the terms by the library's names, with the whole under `loss`.
`at` are the parameters at which what the library detaches is evaluated (default: `p`); holding them
still while `p` moves gives the finite differences that the library's gradient must equal.
"""

import numpy as np


def relu(a):
    return np.maximum(a, 0)


def squared_error(x_hat, x):
    return ((x_hat - x) ** 2).sum(axis=-1).mean()


def decode(z, p):
    return z @ p["W_dec"] + p["b_dec"]


def pre_activations(p, x, centred=False, bias="b_enc"):
    return (x - p["b_dec"] if centred else x) @ p["W_enc"].T + p[bias]


def keep_largest(values, k):
    """`values` [B, F] where they are among the k largest of their row, else 0."""
    keep = np.zeros(values.shape, bool)
    np.put_along_axis(keep, np.argsort(-values, axis=-1)[:, :k], True, axis=-1)
    return np.where(keep, values, 0)


def topk_code(pre, k):
    return keep_largest(relu(pre), k)


def batch_topk_code(pre, k):
    flat = relu(pre).reshape(1, -1)
    return keep_largest(flat, int(k * len(pre))).reshape(pre.shape)


CODES = {"topk": topk_code, "batchtopk": batch_topk_code}


def row_norms(W_dec):
    return np.sqrt((W_dec**2).sum(axis=1))


def total(terms):
    return terms | {"loss": sum(terms.values())}


# SAELens


def saelens_aux(pre, dead, W_dec, residual, coefficient):
    """Pre-activations of dead features, without ReLU, explain the residual; not normalised."""
    n_dead, half = int(dead.sum()), residual.shape[-1] // 2
    if n_dead == 0:
        return 0.0
    chosen = np.argsort(np.where(dead, -pre, np.inf), axis=-1)[:, : min(half, n_dead)]
    acts = np.zeros_like(pre)
    np.put_along_axis(acts, chosen, np.take_along_axis(pre, chosen, -1), -1)
    return coefficient * min(n_dead / half, 1) * squared_error(acts @ W_dec, residual)


def saelens_topk(p, x, *, k, code="topk", centred=False, dead=None, coefficient=0.5, at=None):
    pre = pre_activations(p, x, centred)
    z = CODES[code](pre, k)
    at = at or p
    fixed = CODES[code](pre_activations(at, x, centred), k)
    dead = np.zeros(pre.shape[1], bool) if dead is None else dead
    return total(
        {
            "mse_loss": squared_error(decode(z, p), x),
            "auxiliary_reconstruction_loss": saelens_aux(
                pre, dead, p["W_dec"], x - decode(fixed, at), coefficient
            ),
        }
    )


def saelens_matryoshka(p, x, *, k, widths, dead=None, coefficient=0.5, level_aux=False, at=None):
    at = at or p
    terms = saelens_topk(p, x, k=k, code="batchtopk", dead=dead, coefficient=coefficient, at=at)
    terms.pop("loss")
    pre = pre_activations(p, x)
    z, fixed = batch_topk_code(pre, k), batch_topk_code(pre_activations(at, x), k)
    for w in widths[:-1]:
        x_hat = z[:, :w] @ p["W_dec"][:w] + p["b_dec"]
        terms[f"inner_mse_loss_{w}"] = squared_error(x_hat, x)
    if level_aux:
        levels = [slice(a, b) for a, b in zip([0, *widths[:-1]], widths, strict=True)]
        terms["auxiliary_reconstruction_loss"] = sum(
            saelens_aux(
                pre[:, s],
                dead[s],
                p["W_dec"][s],
                x - (fixed[:, : s.stop] @ at["W_dec"][: s.stop] + at["b_dec"]),
                coefficient,
            )
            for s in levels
        )
    return total(terms)


def saelens_jumprelu(p, x, *, mode, coefficient, target=None, scale=4.0, pre_act=None, dead=None):
    pre, theta = pre_activations(p, x), p["threshold"]
    gate = pre > theta
    z, norms = pre * gate, row_norms(p["W_dec"])
    per_token = {
        "step": lambda: gate.sum(axis=-1),
        "quadratic": lambda: 2 / target * (gate.sum(axis=-1) - target) ** 2,
        "tanh": lambda: np.tanh(scale * z * norms).sum(axis=-1),
    }[mode]()
    terms = {"mse_loss": squared_error(decode(z, p), x), "l0_loss": coefficient * per_token.mean()}
    if pre_act is not None:
        terms["pre_act_loss"] = pre_act * (relu(theta - pre) * dead * norms).sum(axis=-1).mean()
    return total(terms)


def saelens_jumprelu_gradients(
    p,
    x,
    *,
    mode,
    coefficient,
    bandwidth,
    target=None,
    scale=4.0,
    pre_act=None,
    dead=None,
    ste=False,
):
    """Gradients of W_enc, b_enc, b_dec and threshold with the rectangle estimator."""
    pre, theta, n = pre_activations(p, x), p["threshold"], len(x)
    gate = pre > theta
    z, norms = pre * gate, row_norms(p["W_dec"])
    window = np.abs(pre - theta) < bandwidth / 2
    d_error = 2 * (decode(z, p) - x) / n
    d_z = d_error @ p["W_dec"].T
    d_gate = np.zeros((n, 1))
    if mode == "tanh":
        d_z = d_z + coefficient / n * scale * norms / np.cosh(scale * z * norms) ** 2
    elif mode == "step":
        d_gate = d_gate + coefficient / n
    else:
        d_gate = 4 * coefficient / (n * target) * (gate.sum(axis=-1, keepdims=True) - target)
    through_window = (theta * d_z + d_gate) * window / bandwidth
    d_pre = gate * d_z + ste * through_window
    d_theta = -through_window
    if pre_act is not None:
        below = pre_act / n * (pre < theta) * dead * norms
        d_pre, d_theta = d_pre - below, d_theta + below
    return {
        "W_enc": d_pre.T @ x,
        "b_enc": d_pre.sum(axis=0),
        "b_dec": d_error.sum(axis=0),
        "threshold": d_theta.sum(axis=0),
    }


def saelens_gated(p, x, *, coefficient):
    pi = pre_activations(p, x, bias="b_gate")
    magnitude = relu(x @ (p["W_enc"] * np.exp(p["r_mag"])[:, None]).T + p["b_mag"])
    return total(
        {
            "mse_loss": squared_error(decode((pi > 0) * magnitude, p), x),
            "l1_loss": coefficient * (relu(pi) * row_norms(p["W_dec"])).sum(axis=-1).mean(),
            "auxiliary_reconstruction_loss": squared_error(decode(relu(pi), p), x),
        }
    )


def saelens_standard(p, x, *, coefficient):
    z = relu(pre_activations(p, x))
    l1 = coefficient * (z * row_norms(p["W_dec"])).sum(axis=-1).mean()
    return total({"mse_loss": squared_error(decode(z, p), x), "l1_loss": l1})


# dictionary_learning


def dl_aux(pre, dead, W_dec, residual):
    """ReLU of the dead features explains the residual, divided by the residual's variance."""
    count = min(residual.shape[-1] // 2, int(dead.sum()))
    acts = keep_largest(np.where(dead, relu(pre), -1), count)
    left = squared_error(np.where(dead, acts, 0) @ W_dec, residual)
    return left / squared_error(residual, residual.mean(axis=0))


def dl_topk(p, x, *, k, dead, code="topk", alpha=1 / 32, at=None):
    at = at or p
    pre = pre_activations(p, x, centred=True)
    residual = x - decode(CODES[code](pre_activations(at, x, centred=True), k), at)
    l2 = squared_error(decode(CODES[code](pre, k), p), x)
    aux = dl_aux(pre, dead, p["W_dec"], residual)
    return {"l2_loss": l2, "auxk_loss": aux, "loss": l2 + alpha * aux}


def dl_matryoshka(p, x, *, k, widths, weights, dead, alpha=1 / 32, at=None):
    terms = dl_topk(p, x, k=k, dead=dead, code="batchtopk", alpha=alpha, at=at)
    z = batch_topk_code(pre_activations(p, x, centred=True), k)
    levels = [
        weight * squared_error(z[:, :w] @ p["W_dec"][:w] + p["b_dec"], x)
        for w, weight in zip(widths, weights, strict=True)
    ]
    l2 = sum(levels) / len(levels)
    terms |= {"l2_loss": l2, "loss": l2 + alpha * terms["auxk_loss"]}
    return terms | {"min_l2_loss": min(levels), "max_l2_loss": max(levels)}


def dl_jumprelu(p, x, *, coefficient, target):
    pre = pre_activations(p, x)
    z = pre * (pre > p["threshold"])
    l2, l0 = squared_error(decode(z, p), x), (z > p["threshold"]).sum(axis=-1).mean()
    return {"l2_loss": l2, "loss": l2 + coefficient * (l0 / target - 1) ** 2}


def dl_jumprelu_threshold_gradient(p, x, *, coefficient, target, bandwidth):
    """The L0 estimator looks at z instead of pre: of the inactive side only zeros are in reach."""
    pre, theta, n = pre_activations(p, x), p["threshold"], len(x)
    z = pre * (pre > theta)
    d_z = 2 * (decode(z, p) - x) / n @ p["W_dec"].T
    d_gate = 2 * coefficient / (n * target) * ((z > theta).sum(axis=-1).mean() / target - 1)
    by_error = theta * d_z * (np.abs(pre - theta) < bandwidth / 2)
    by_l0 = d_gate * (np.abs(z - theta) < bandwidth / 2)
    return -(by_error + by_l0).sum(axis=0) / bandwidth


def dl_gated(p, x, *, coefficient, at=None):
    pi = pre_activations(p, x, centred=True, bias="b_gate")
    linear = (x - p["b_dec"]) @ p["W_enc"].T
    z = (pi > 0) * relu(np.exp(p["r_mag"]) * linear + p["b_mag"])
    terms = {
        "mse_loss": squared_error(decode(z, p), x),
        "sparsity_loss": relu(pi).sum(axis=-1).mean(),
        "aux_loss": squared_error(decode(relu(pi), at or p), x),
    }
    loss = terms["mse_loss"] + coefficient * terms["sparsity_loss"] + terms["aux_loss"]
    return terms | {"loss": loss}


def dl_standard(p, x, *, coefficient, centred, power):
    """`power` of the decoder norm: 1 with AutoEncoder, 2 with AutoEncoderNew."""
    z = relu(pre_activations(p, x, centred))
    x_hat = decode(z, p)
    terms = {
        "l2_loss": np.sqrt(((x - x_hat) ** 2).sum(axis=-1)).mean(),
        "mse_loss": squared_error(x_hat, x),
        "sparsity_loss": (z * row_norms(p["W_dec"]) ** power).sum(axis=-1).mean(),
    }
    return terms | {"loss": terms["mse_loss"] + coefficient * terms["sparsity_loss"]}
