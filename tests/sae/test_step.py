import math

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.activation_functions import ACTIVATION_FUNCTIONS
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dead_features import dead_features
from mlxterp.sae.initialization import Normalisation, initial_params
from mlxterp.sae.optimizer import unit_rows
from mlxterp.sae.step import StepBuilder, initial_state, zero_sums
from tests.sae import kinds
from tests.sae.reference import Adam, Reference, trained_threshold
from tests.sae.synthetic import planted

D, N, K, BATCH = 8, 40, 4, 32
COLUMNS = Columns(("layers.0.mlp",), (D,))
UNCHANGED = Normalisation(mx.zeros((D,)), mx.zeros((D,)), mx.ones((D,)))
ONE = mx.array(1.0)


@pytest.fixture(params=[True, False], ids=["segments", "dense products"])
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


def batches(n: int, seed: int = 0, scale: float = 1.0, width: int = D) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    mixing = 0.5 * rng.normal(size=(width, width))
    return [
        mx.array((scale * rng.normal(size=(BATCH, width)) @ mixing).astype(np.float32))
        for _ in range(n)
    ]


def random_params(config: SAEConfig, coder: SparseCoder) -> dict[str, mx.array]:
    """Away from the special initial values, so that every term of every gradient shows."""
    rng = np.random.default_rng(2)
    rows = len(coder.W_dec)
    arrays = {
        "W_dec": rng.normal(size=coder.W_dec.shape) * rng.uniform(0.3, 0.6, (rows, 1)),
        "b_dec": 0.3 * rng.normal(size=coder.d_out),
        "b_enc": 0.3 * rng.normal(size=N),
    }
    if not config.tied_weights:
        arrays["W_enc"] = 0.5 * rng.normal(size=coder.W_enc.shape)
    if coder.has_skip:
        arrays["W_skip"] = 0.3 * rng.normal(size=coder.W_skip.shape)
    if config.activation_function == "jumprelu":
        arrays |= trained_threshold(rng.uniform(0.2, 0.8, N))
    if config.activation_function == "gated":
        arrays |= {"log_gain": 0.5 * rng.normal(size=N), "offset": 0.5 * rng.normal(size=N)}
    params = {name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}
    return params | ({"W_dec": unit_rows(params["W_dec"])} if config.decoder_unit_norm else {})


class Case:
    """A config with its coder, its initial parameters and state, and its steps.

    The coder is of a kind, on activations of all sites of `kinds`, or one of a site of width `D`.
    """

    def __init__(self, normalisation=UNCHANGED, kind="", **options):
        usual = {"k": K, "bandwidth": 0.6, "gradient_clip": 0.0, **kinds.settings(kind)}
        self.config = SAEConfig(**{**usual, **options})
        name, columns = self.config.activation_function, COLUMNS
        self.coder = SparseCoder(COLUMNS, COLUMNS, N, name, K)
        if kind:
            columns, self.coder = kinds.SITES, kinds.make(kind, name, N, K)
            normalisation = Normalisation(*(mx.full((columns.width,), x) for x in (0.0, 0.0, 1.0)))
        self.columns = columns
        self.params = random_params(self.config, self.coder)
        self.state = initial_state(self.params, self.coder, self.config)
        self.builder = StepBuilder(self.coder, columns, normalisation, self.config, 1000)

    def batches(self, n: int) -> list[mx.array]:
        return batches(n, width=self.columns.width)

    def reference(self, n_revived: int) -> Reference:
        coder, d_out = self.coder, self.coder.d_out
        return Reference(
            self.config,
            tuple(round(share * N) for share in self.config.matryoshka_prefixes),
            d_out // 2 if n_revived else 0,
            tuple(coder.writes.slices.values()),
            tuple((b.features, b.reads, b.writes) for b in coder.blocks),
        )

    def step(self, n_revived: int = 0, k: int = K, lean: bool = False):
        made = self.builder.make(k, n_revived, lean)
        return lambda state, batch, rate=0.01, share=1.0: made(
            state, batch, mx.array(rate), mx.array(share)
        )


def with_dead(state: dict, dead: np.ndarray) -> dict:
    fired = mx.array(np.where(dead, 0.0, 1e6).astype(np.float32))
    return {**state, "fired": fired, "fired_before": mx.zeros((N,)), "counted": mx.array(1e4)}


def dead_mask(n: int = 15) -> np.ndarray:
    dead = np.zeros(N, bool)
    dead[np.random.default_rng(3).permutation(N)[:n]] = True
    return dead


VARIANTS = {
    "plain": {},
    "with l1": {"lambda_sparse": 0.05},
    "clipped": {"gradient_clip": 0.05},
    "clip out of reach": {"gradient_clip": 1e3},
    "auxiliary": {"n_revived": 16},
    "auxiliary with more than are dead": {"n_revived": N},
    "tied": {"tied_weights": True},
    "free rows": {"decoder_unit_norm": False, "lambda_sparse": 0.05},
    "matryoshka": {"matryoshka_prefixes": (0.2, 0.5)},
    "batch_topk": {"activation_function": "batch_topk"},
    "batch_topk and matryoshka": {
        "activation_function": "batch_topk", "matryoshka_prefixes": (0.2, 0.5), "n_revived": 16,
    },
    "abs_topk": {"activation_function": "abs_topk", "lambda_sparse": 0.05},
    "everything": {
        "lambda_sparse": 0.01, "gradient_clip": 0.1, "n_revived": 16, "tied_weights": True,
    },
}  # fmt: skip
DENSE = {
    "relu": {"activation_function": "relu"},
    "relu with free rows": {"activation_function": "relu", "decoder_unit_norm": False},
    "relu with tanh": {"activation_function": "relu", "sparsity_penalty": "tanh"},
    "gated": {"activation_function": "gated", "n_revived": 16},
    "gated and matryoshka": {"activation_function": "gated", "matryoshka_prefixes": (0.5,)},
    "jumprelu": {"activation_function": "jumprelu", "sparsity_penalty": "l0"},
    "jumprelu with tanh": {"activation_function": "jumprelu", "sparsity_penalty": "tanh"},
    "jumprelu with quadratic": {
        "activation_function": "jumprelu", "sparsity_penalty": "quadratic", "gradient_clip": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_dense_reference(variant, form):
    check_against_reference(VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_in_several_evaluations_equals_the_dense_reference(variant):
    check_against_reference(VARIANTS[variant], lean=True)


@pytest.mark.parametrize("variant", DENSE)
def test_step_of_penalised_functions_equals_the_dense_reference(variant):
    check_against_reference({"lambda_sparse": 0.02, **DENSE[variant]})


def test_compiled_step_equals_the_dense_reference(form):
    # MLX compiles CPU kernels once per machine, which takes seconds: one variant has every term.
    check_against_reference(VARIANTS["everything"], compiled=True)


def near(found, expected, relative: float, err_msg: str) -> None:
    expected = np.array(expected)
    atol = relative * np.abs(expected).max()
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=atol, err_msg=err_msg)


# All terms, for every kind and, with one site and with several, every activation function.
OF_KINDS = [(kind, name) for kind, name in kinds.PAIRS if kind != "sae"]


@pytest.mark.parametrize("lean", [False, True], ids=["pure", "lean"])
@pytest.mark.parametrize(("kind", "name"), OF_KINDS)
def test_step_of_every_kind_equals_the_dense_reference(kind, name, lean, form):
    options = {"activation_function": name, "lambda_sparse": 0.02, "gradient_clip": 0.1}
    check_against_reference({"kind": kind, "n_revived": 16, **options}, lean=lean)


def check_against_reference(options: dict, compiled: bool = False, lean: bool = False) -> None:
    options = {"auxiliary_coefficient": 0.5, **options}
    n_revived = options.pop("n_revived", 0)
    case = Case(**options)
    config, state, rate = case.config, with_dead(case.state, dead_mask()), 0.01
    coder, reference = case.coder, case.reference(n_revived)
    optimizer = Adam(case.params, config.gradient_clip, config.decoder_unit_norm)
    step = case.step(n_revived, lean=lean)
    step = mx.compile(step) if compiled else step
    for i, batch in enumerate(case.batches(4)):
        # The reference sees the features that the real one counts as dead.
        dead = np.array(dead_features(state, config.dead_neuron_threshold))
        before = state
        state = step(state, batch)
        mx.eval(state)
        x, y = (case.columns.take(batch, s.names) for s in (coder.reads, coder.writes))
        params = kinds.dense(coder, optimizer.params)
        loss, terms, gradients = reference.gradients(params, x, y, dead)
        norm = optimizer.step(kinds.compact(coder, gradients), rate)
        assert norm > config.gradient_clip or config.gradient_clip == 1e3
        loss_sum = (state["sums"]["loss"] - before["sums"]["loss"]).item()
        assert loss_sum == pytest.approx(loss, rel=2e-5)
        fired = np.array(state["fired"] - before["fired"])
        np.testing.assert_allclose(fired, (terms["z"] != 0).sum(axis=0), atol=0.1)
        for name in optimizer.params:
            where = f"{name} at step {i}"
            near(state["m"][name], optimizer.m[name], 1e-4, where)
            near(state["v"][name], optimizer.v[name], 2e-4, where)
            found = np.array(state["params"][name])
            np.testing.assert_allclose(found, optimizer.params[name], atol=2e-2 * rate)
    if n_revived:
        assert np.abs(optimizer.m["b_enc"][dead_mask()]).max() > 0


@pytest.mark.parametrize("kind", ["", *kinds.KINDS])
def test_the_auxiliary_loss_moves_dead_features_and_no_others(kind, form):
    case, dead = Case(kind=kind), dead_mask(8)
    state = with_dead(case.state, dead)
    (batch,) = case.batches(1)
    plain, revived = (case.step(n)(state, batch, 0.0)["m"] for n in (0, 16))
    both = [
        kinds.dense(case.coder, {n: np.array(a) for n, a in m.items()}) for m in (plain, revived)
    ]
    for name, before in both[0].items():
        added = np.abs(both[1][name] - before)
        if name in ("b_dec", "W_skip"):
            assert not added.any()
            continue
        # Not exactly zero: a GPU adds what belongs to one feature in any order.
        rounding = 1e-6 * np.abs(before).max()
        assert added[~dead].max() < rounding < 1e-2 * added[dead].max(), name
        reached = added[dead].reshape(dead.sum(), -1).max(axis=1) > 1e-6
        assert reached.all(), name


def test_decoder_rows_keep_unit_norm():
    case = Case()
    step, state = case.step(), case.state
    for batch in batches(5):
        state = step(state, batch, 0.3)
    norms = np.linalg.norm(np.array(state["params"]["W_dec"], np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def flat(state: dict, prefix: str = "") -> dict[str, mx.array]:
    """All arrays of a state by their path."""
    found = {}
    for name, value in state.items():
        path = prefix + name
        found |= flat(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return found


@pytest.mark.parametrize(
    ("kind", "name"), [*(("", name) for name in sorted(ACTIVATION_FUNCTIONS)), *OF_KINDS]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e30])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(value, kind, name):
    case = Case(kind=kind, activation_function=name)
    step = case.step(n_revived=16)
    good, bad = case.batches(2)
    state = step(with_dead(case.state, dead_mask()), good)
    after = step(step(state, bad_entry(bad, value, 2)), bad_entry(bad, value, -6 if kind else 3))
    after = step(after, bad * value)
    before = flat(state)
    for path, array in flat(after).items():
        if not path.startswith("skipped"):
            assert mx.array_equal(array, before[path]), path
    assert after["skipped"].item() == 3 and after["skipped_in_a_row"].item() == 3
    recovered = step(after, good)
    assert recovered["skipped"].item() == 3 and recovered["skipped_in_a_row"].item() == 0
    assert not mx.array_equal(recovered["params"]["W_dec"], state["params"]["W_dec"])


def bad_entry(batch: mx.array, value: float, column: int) -> mx.array:
    """With several sites, column 2 is of one that is read and column -6 of one that is written."""
    array = np.array(batch)
    array[3, column] = value
    return mx.array(array)


def test_sums_add_up_loss_error_energy_and_l0():
    # Neither centred nor at the mean, which the energy is measured from.
    mean, centre, scale = (mx.full((D,), value) for value in (0.75, 0.25, 2.0))
    case = Case(Normalisation(mean, centre, scale), lambda_sparse=0.05)
    step, state = case.step(), case.state
    expected = dict.fromkeys(("loss", "error", "energy", "l0"), 0.0)
    for batch in batches(3):
        x = (np.array(batch, np.float64) - 0.25) * 2
        reference = Reference(case.config)
        loss, terms, _ = reference.gradients(case.params, x, x, np.zeros(N, bool))
        expected["loss"] += loss
        expected["error"] += terms["error"].item()
        expected["energy"] += np.mean((x - 1) ** 2)
        expected["l0"] += (terms["z"] > 0).sum(axis=1).mean()
        # Parameters stay, because the learning rate is zero.
        state = step(state, batch, 0.0)
    found = {name: total.item() for name, total in state["sums"].items()}
    assert found.pop("n") == 3
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["loss"] > found["error"]
    assert all(total.item() == 0 for total in zero_sums().values())


def test_counts_grow_by_the_tokens_and_firings_of_each_step():
    case = Case()
    state = case.state
    assert not dead_features(state, 0.5).any().item(), "dead at the start"
    for i, batch in enumerate(batches(2), start=1):
        state = case.step()(state, batch)
        assert state["counted"].item() == i * BATCH
    assert state["fired"].sum().item() == pytest.approx(state["sums"]["l0"].item() * BATCH)


def test_a_coder_of_several_sites_reads_some_columns_and_writes_others():
    columns = Columns(("a", "b", "c"), (2, 3, 4))
    normalisation = Normalisation(mx.arange(9.0), mx.arange(9.0), mx.linspace(1, 2, 9))
    coder = SparseCoder(columns.only("c"), columns.only("a"), N, k=K)
    builder = StepBuilder(coder, columns, normalisation, SAEConfig(k=K), 1000)
    batch = mx.random.normal((5, 9), key=mx.random.key(0))
    x, y = builder.split(batch)
    whole = (np.array(batch) - np.arange(9)) * np.linspace(1, 2, 9)
    np.testing.assert_allclose(np.array(x), whole[:, 5:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(y), whole[:, :2], rtol=1e-5, atol=1e-6)


def test_batch_top_k_averages_the_smallest_value_it_kept():
    case = Case(activation_function="batch_topk")
    state, smallest = case.state, []
    for batch in batches(3):
        _, terms, _ = Reference(case.config).gradients(state["params"], batch, batch, dead_mask())
        smallest.append(terms["z"][terms["z"] > 0].min())
        state = case.step()(state, batch)
        found = state["averaged"]["threshold"].item()
        assert found == pytest.approx(np.mean(smallest), rel=1e-5)


def coefficient_of_next_step(case: Case, state: dict, share: float = 1.0) -> float:
    """As the loss shows it: what the penalty adds, over the penalty."""
    (batch,) = batches(1)
    with_penalty = case.step()(state, batch, 0.0, share)["sums"]["loss"] - state["sums"]["loss"]
    without = case.step()(state, batch, 0.0, 0.0)["sums"]["loss"] - state["sums"]["loss"]
    pre = np.array(batch) @ np.array(case.params["W_enc"]).T + np.array(case.params["b_enc"])
    return (with_penalty - without).item() / np.maximum(pre, 0).sum(axis=1).mean()


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_the_coefficient_rises_while_too_many_features_are_active(name):
    (batch,) = batches(1)
    for target, sign in ((2.0, 1), (38.0, -1)):
        case = Case(activation_function=name, target_l0=target)
        state, before = case.state, coefficient_of_next_step(case, case.state)
        for _ in range(5):
            state = case.step()(state, batch, 0.0)
        integral = (state["log_coefficient"] - case.state["log_coefficient"]).item()
        assert sign * integral > 0
        # It also answers at once, in proportion to how far off the L0 is.
        assert math.log(coefficient_of_next_step(case, state) / before) * sign > sign * integral


def test_the_averaged_l0_follows_the_l0():
    case = Case(activation_function="relu", target_l0=2.0)
    (batch,) = batches(1)
    state = case.step()(case.state, batch, 0.0)
    l0 = state["sums"]["l0"].item()
    first = state["mean_l0"].item()
    assert 2 < first < l0
    for _ in range(100):
        state = case.step()(state, batch, 0.0)
    assert state["mean_l0"].item() == pytest.approx(l0, rel=1e-3)


def test_on_target_the_coefficient_stays():
    case = Case(activation_function="relu", target_l0=7.0)
    (batch,) = batches(1)
    l0 = case.step()(case.state, batch, 0.0)["sums"]["l0"].item()
    case = Case(activation_function="relu", target_l0=l0)
    state = case.step()(case.state, batch, 0.0)
    change = (state["log_coefficient"] - case.state["log_coefficient"]).item()
    assert change == pytest.approx(0, abs=1e-6)


def test_the_share_of_the_warm_up_scales_the_penalty():
    case = Case(activation_function="relu", lambda_sparse=0.5)
    assert coefficient_of_next_step(case, case.state) == pytest.approx(0.5, rel=1e-4)
    assert coefficient_of_next_step(case, case.state, 0.25) == pytest.approx(0.125, rel=1e-4)


UNSTEERED = {
    "a fixed lambda": {"activation_function": "relu", "lambda_sparse": 0.3},
    "quadratic": {"activation_function": "jumprelu", "sparsity_penalty": "quadratic"},
    "no penalty": {},
    "topk with l1": {"lambda_sparse": 0.3},
}


@pytest.mark.parametrize("variant", UNSTEERED)
def test_other_coefficients_are_not_steered(variant):
    case = Case(**UNSTEERED[variant])
    state = case.state
    for batch in batches(3):
        state = case.step()(state, batch)
    for name in ("log_coefficient", "mean_l0"):
        assert state[name].item() == case.state[name].item()


def test_a_fixed_lambda_with_a_target_is_where_steering_starts():
    case = Case(activation_function="relu", lambda_sparse=0.3, target_l0=2.0)
    assert math.exp(case.state["log_coefficient"].item()) == pytest.approx(0.3)
    state = case.step()(case.state, batches(1)[0])
    assert state["log_coefficient"].item() > case.state["log_coefficient"].item()


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_steering_reaches_the_wanted_l0(name):
    n_steps, target = 600, 3.0
    _, tokens = planted(16_000, width=16, n_features=32)
    data, columns = mx.array(tokens), Columns(("site",), (16,))
    config = SAEConfig(activation_function=name, target_l0=target, expansion_factor=4)
    coder = SparseCoder(columns, columns, 64, name, None)
    normalisation = Normalisation.measure(data, columns, True)
    params = initial_params(coder, normalisation, columns, config, data)
    state = initial_state(params, coder, config)
    step = StepBuilder(coder, columns, normalisation, config, n_steps).make(K, 0)
    for i in range(n_steps):
        start = 128 * i % 15_872
        share = mx.array(min(1.0, i / 100))
        state = step(state, data[start : start + 128], mx.array(3e-3), share)
        mx.eval(state)
        if i == 20:
            first = state["sums"]["l0"].item() / 21
        if i == n_steps - 201:
            state["sums"] = zero_sums()
    last = state["sums"]["l0"].item() / state["sums"]["n"].item()
    assert first > 3 * target
    assert last == pytest.approx(target, rel=0.15)
    assert (state["sums"]["error"] / state["sums"]["energy"]).item() < 0.9
