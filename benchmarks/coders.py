"""How good transcoders, crosscoders and cross-layer transcoders are on the bundled model.

    python benchmarks/coders.py [--part mlp|pairs|crosscoders|cross_layer|starts] [--tokens N]

Text is the demonstration's. Every coder is trained by the recipe on the same tokens, as often, and
measured on held-out documents: FVU, L0, features that are silent, and how much of the model's loss
against mean ablation is kept when the coder takes the place of the real computation.

`mlp`: over one MLP, a transcoder beside an SAE of its output of the same size, and beside the best
affine map. `pairs`: across layers and components. `crosscoders`: components and layers.
`cross_layer`: one cross-layer transcoder over all MLPs beside a transcoder of each. `starts`: what
the decoder starts from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx  # isort: skip

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import (
    ActivationDataset,
    CrosscoderConfig,
    CrosscoderTrainer,
    CrossLayerConfig,
    CrossLayerTrainer,
    CrossLayerTranscoder,
    SAEConfig,
    SAETrainer,
    Transcoder,
    TranscoderConfig,
    TranscoderTrainer,
    initialization,
)
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.evals.loss import LossRecovered, loss_recovered

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

HEADER = (
    f"{'':<40} {'features':>8} {'L0':>6} {'FVU':>7} {'silent':>7} {'recovered':>9} "
    f"{'loss':>7} {'seconds':>7}"
)


class Bench:
    """The model, its texts, and how coders are trained, measured and printed."""

    def __init__(self, tokens: int, seen: int, loss_tokens: int):
        self.model = InterpretableModel.demo()
        self.texts = python_texts()
        self.tokens, self.loss_tokens = tokens, loss_tokens
        self.num_epochs = max(1, round(seen / tokens))

    def dataset(self, *sites: str) -> tuple[ActivationDataset, ActivationDataset]:
        """Activations of some sites over the same tokens, to train on and held out."""
        whole = ActivationDataset.from_texts(
            self.model, self.texts, list(sites), context_length=128, max_samples=self.tokens
        )
        return whole.split(0.05)

    def config(self, kind: type[SAEConfig], **settings: Any) -> SAEConfig:
        """The recipe, with everything for training."""
        chosen = {"num_epochs": self.num_epochs, "validation_split": 0.0, **settings}
        return kind.recommended(self.model.d_model, self.tokens, **chosen)

    def show(
        self, name: str, held_out: ActivationDataset, train: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Train, measure and print a row, and one for each of several sites."""
        started = time.perf_counter()
        coder = train(*arguments)
        seconds = time.perf_counter() - started
        self.measure(name, coder, held_out, f"{seconds:>7.0f}")
        return coder

    def measure(
        self, name: str, coder: SparseCoder, held_out: ActivationDataset, seconds: str = ""
    ) -> None:
        """A row of figures on held-out data, and one for each of several sites."""
        found = fidelity(coder, held_out)
        loss = loss_recovered(coder, held_out, self.loss_tokens)
        print(
            f"{name:<40} {coder.n_features:>8,} {found.l0:>6.1f} {found.fvu:>7.4f} "
            f"{100 * found.dead:>6.1f}% {_loss(loss)} {seconds}",
            flush=True,
        )
        for site, alone in loss.by_site.items():
            fvu = found.fvu_by_site[site]
            print(f"{'  ' + site + ' alone':<40} {'':>15} {fvu:>7.4f} {'':>7} {_loss(alone)}")


def _loss(found: LossRecovered) -> str:
    share = "-" if found.recovered is None else f"{100 * found.recovered:.1f}%"
    return f"{share:>9} {found.spliced - found.clean:>+7.3f}"


def over_mlps(bench: Bench) -> None:
    """Over one MLP at a time."""
    for layer in (1, 3, 5):
        sites = f"layers.{layer}.mlp_in", f"layers.{layer}.mlp_out"
        data, held_out = bench.dataset(*sites)
        for k in (16, 32):
            sae = bench.config(SAEConfig, expansion_factor=8, k=k)
            output = data.columns.only(sites[1])
            train = SAETrainer(sae).fit_between
            bench.show(f"SAE of {sites[1]}, k={k}", held_out, train, output, output, data)
            for name, settings in {
                "transcoder": {},
                "transcoder, skip": {"skip": True},
                "transcoder, skip by least squares": {"skip": True, "skip_init": "least_squares"},
            }.items():
                config = bench.config(TranscoderConfig, k=k, **settings)
                bench.show(f"{name}, k={k}", held_out, TranscoderTrainer(config).fit, data)
        bench.measure("the best affine map", best_affine(data, *sites), held_out)


def best_affine(data: ActivationDataset, source: str, target: str) -> Transcoder:
    """What least squares make of a transcoder's skip connection, without features."""
    reads, writes = data.columns.only(source), data.columns.only(target)
    rows = np.array(mx.concatenate(list(data.batches(4096))), np.float64)
    x, y = rows[:, data.columns.slices[source]], rows[:, data.columns.slices[target]]
    W = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0].T
    coder = Transcoder(reads, writes, 1, "relu", skip=True)
    coder.W_skip = mx.array(W.astype(np.float32))
    coder.b_dec = mx.array((y.mean(0) - W @ x.mean(0)).astype(np.float32))
    return coder


def pairs(bench: Bench) -> None:
    """Across layers and components."""
    for source, target in (
        ("layers.2.mlp", "layers.3.mlp"),
        ("layers.2.mlp", "layers.3.attn"),
        ("layers.2.resid_post", "layers.3.resid_post"),
        ("layers.2.resid_post", "layers.5.resid_post"),
        ("layers.3.attn_in", "layers.3.mlp_out"),
    ):
        data, held_out = bench.dataset(source, target)
        config = bench.config(TranscoderConfig, k=32)
        name = f"{source} -> {target}".replace("layers.", "")
        bench.show(name, held_out, TranscoderTrainer(config).fit, data)


def crosscoders(bench: Bench) -> None:
    """Components of a layer, and layers."""
    for sites in (
        ("layers.3.mlp", "layers.3.attn"),
        ("layers.1.resid_post", "layers.3.resid_post", "layers.5.resid_post"),
    ):
        data, held_out = bench.dataset(*sites)
        for function in ("topk", "batch_topk", "relu", "jumprelu"):
            config = bench.config(
                CrosscoderConfig, expansion_factor=16, k=32, activation_function=function
            )
            name = f"{len(sites)} sites, {function}"
            coder = bench.show(name, held_out, CrosscoderTrainer(config).fit, data)
            print(f"  {coder.sharing().counts}")


def cross_layer(bench: Bench) -> None:
    """All MLPs at once."""
    layers = range(bench.model.n_layers)
    reads, writes = ([f"layers.{i}.mlp_{end}" for i in layers] for end in ("in", "out"))
    data, held_out = bench.dataset(*reads, *writes)
    config = bench.config(TranscoderConfig, k=16)
    transcoders = [
        TranscoderTrainer(config).fit(data, reads=source, writes=target)
        for source, target in zip(reads, writes, strict=True)
    ]
    bench.measure("a transcoder of each MLP", joined(transcoders), held_out)
    for function in ("batch_topk", "topk", "jumprelu"):
        config = bench.config(CrossLayerConfig, k=16, activation_function=function)
        name, train = f"cross-layer transcoder, {function}", CrossLayerTrainer(config).fit
        bench.show(name, held_out, train, data, reads, writes)


def joined(transcoders: list[Transcoder]) -> CrossLayerTranscoder:
    """Transcoders of several layers as one of the cross-layer kind, which writes across none."""
    reads, writes = (
        Columns(
            tuple(getattr(t, side).names[0] for t in transcoders),
            tuple(getattr(t, side).width for t in transcoders),
        )
        for side in ("reads", "writes")
    )
    n = transcoders[0].n_features
    name, k = transcoders[0].activation_name, transcoders[0].k
    found = CrossLayerTranscoder(reads, writes, n * len(transcoders), name, k)
    for array in ("W_enc", "b_enc", "b_dec"):
        found[array] = mx.concatenate([transcoder[array] for transcoder in transcoders])
    blocks = zip(transcoders, found.decoder_blocks(), strict=True)
    found.W_dec = found.joined_decoder(
        [mx.concatenate([t.W_dec, rows[:, t.d_out :]], axis=1) for t, rows in blocks]
    )
    thresholds = [t.activation_function.threshold for t in transcoders]
    found.activation_function.threshold = mx.stack(thresholds)
    return found


def starts(bench: Bench) -> None:
    """What the decoder of a transcoder starts from."""
    regressed = initialization._regressed
    kinds: dict[str, Callable[..., mx.array]] = {
        "regressed on the target": regressed,
        "random directions": lambda objective, params, x, y: params["W_dec"],
    }
    for layer in (1, 3):
        data, held_out = bench.dataset(f"layers.{layer}.mlp_in", f"layers.{layer}.mlp_out")
        for name, start in kinds.items():
            initialization._regressed = start
            for k in (16, 32):
                config = bench.config(TranscoderConfig, k=k, seed=0)
                train = TranscoderTrainer(config).fit
                bench.show(f"layer {layer}, k={k}, {name}", held_out, train, data)
        initialization._regressed = regressed


PARTS = {
    "mlp": over_mlps,
    "pairs": pairs,
    "crosscoders": crosscoders,
    "cross_layer": cross_layer,
    "starts": starts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=300_000, help="different tokens")
    parser.add_argument("--seen", type=int, default=3_000_000, help="tokens in training")
    parser.add_argument("--loss-tokens", type=int, default=10_000)
    arguments = parser.parse_args()
    bench = Bench(arguments.tokens, arguments.seen, arguments.loss_tokens)
    for part in arguments.part:
        print(f"\n{PARTS[part].__doc__}\n{HEADER}")
        PARTS[part](bench)


if __name__ == "__main__":
    main()
