"""Files of circuit-tracer 0.5.0, written and judged by itself.

    python tests/golden/formats/make_circuit_tracer.py

Needs torch and circuit-tracer, which writes the cross-layer transcoders itself. A set is written as
its loader reads it, and one layer again with `W_dec` the other way round, as in an older release.
"""

import numpy as np
import torch
import yaml
from circuit_tracer.frontend.graph_models import Metadata, Model, Node, QParams
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder
from drawn import D, Expected, F, draw, inputs, thresholds_at
from safetensors.torch import save_file

LAYERS, FEATURES = 3, 16
SECOND = {"model_name": "google/gemma-3-270m", "scan": "someone/transcoders"}


def weights(rng, skip, threshold, n=F):
    p = {
        "W_enc": draw(rng, n, D, scale=0.7), "W_dec": draw(rng, n, D), "b_enc": draw(rng, n),
        "b_dec": draw(rng, D, scale=20),
    }  # fmt: skip
    if skip:
        p["W_skip"] = draw(rng, D, D)
    if threshold:
        name = "activation_function.threshold"
        p[name] = thresholds_at(p["W_enc"][:, 0] + p["b_enc"])
    return {name: torch.tensor(array) for name, array in p.items()}


def transcoder_sets(expected, x):
    """Two sets: ReLU with and without skip connections, and JumpReLU; the last layer of each is in
    bfloat16."""
    sets = {
        "relu_set": ("mlp.hook_in", "mlp.hook_out", False),
        "jumprelu_set": ("mlp.hook_in", "hook_mlp_out", True),
    }
    for seed, (name, (reads, writes, threshold)) in enumerate(sets.items()):
        folder = expected.folder / name
        folder.mkdir(exist_ok=True)
        config = SECOND | {
            "model_kind": "transcoder_set", "feature_input_hook": reads,
            "feature_output_hook": writes,
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for layer in range(3):
            p = weights(np.random.default_rng(10 * seed + layer), layer == 1, threshold)
            if layer == 2:
                p = {key: array.to(torch.bfloat16) for key, array in p.items()}
            file = folder / f"layer_{layer}.safetensors"
            save_file(p, file)
            judge = load_relu_transcoder(str(file), layer, lazy_encoder=False, lazy_decoder=False)
            with torch.no_grad():
                z = judge.encode(torch.tensor(x))
                y = judge.decode(z, torch.tensor(x))
            expected.add(f"{name}/{layer}", x, z, y)
            if name == "relu_set" and layer == 0:
                other = folder.parent / "other_way_round"
                other.mkdir(exist_ok=True)
                save_file(p | {"W_dec": p["W_dec"].T.contiguous()}, other / "layer_0.safetensors")


def cross_layer(expected, threshold):
    name = "jumprelu_clt" if threshold else "relu_clt"
    rng = np.random.default_rng(30 + threshold)
    clt = CrossLayerTranscoder(
        LAYERS, FEATURES, D, "jump_relu" if threshold else "relu", lazy_decoder=False,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        clt.W_enc[:] = torch.tensor(draw(rng, LAYERS, FEATURES, D, scale=0.7))
        clt.b_enc[:] = torch.tensor(draw(rng, LAYERS, FEATURES))
        clt.b_dec[:] = torch.tensor(draw(rng, LAYERS, D, scale=20))
        for rows in clt.W_dec:
            rows[:] = torch.tensor(draw(rng, *rows.shape))
        if threshold:
            assert isinstance(clt.activation_function, JumpReLU)
            pre = (clt.W_enc[:, :, 0] + clt.b_enc).numpy()
            at = np.stack([thresholds_at(row) for row in pre])
            clt.activation_function.threshold[:] = torch.tensor(at)[:, None]
    folder = expected.folder / name
    clt.to_safetensors(str(folder))
    config = SECOND | {
        "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    judge = load_clt(
        str(folder), lazy_decoder=False, dtype=torch.float32, device=torch.device("cpu")
    )
    x = np.stack([inputs(rng) for _ in range(LAYERS)])
    with torch.no_grad():
        z = judge.encode(torch.tensor(x))
        y = judge.decode(z.to_sparse())
    joined = (np.swapaxes(np.asarray(part), 0, 1).reshape(x.shape[1], -1) for part in (x, z, y))
    expected.add(name, *joined)


def graph(folder):
    """An attribution graph of features in two layers, with errors, tokens and a logit."""
    tokens = ["<bos>", " a", ' "b"']
    nodes = [
        Node.token_node(1, 17, 0.9), Node.token_node(2, 23, 0.8),
        Node.feature_node(1, 1, 42, 0.3, 2.5), Node.feature_node(3, 2, 7, 0.5, 0.125),
        Node.error_node(1, 1, 0.6), Node.logit_node(2, 99, ' "c" (p=1)', 4, True, 0.75),
    ]  # fmt: skip
    ends = [(0, 2, 1.5), (1, 3, -0.5), (2, 3, 4.0), (4, 3, 0.25), (2, 5, -8.0), (3, 5, 2.0)]
    links = [
        {"source": nodes[a].node_id, "target": nodes[b].node_id, "weight": w} for a, b, w in ends
    ]
    about = Metadata(
        slug="small", scan="tiny", transcoder_list=[], prompt_tokens=tokens, prompt="".join(tokens),
        node_threshold=0.8,
    )  # fmt: skip
    params = QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos="")
    model = Model(metadata=about, qParams=params, nodes=nodes, links=links)
    (folder / "graph.json").write_text(model.model_dump_json(indent=1) + "\n")


def main():
    expected = Expected("circuit_tracer")
    transcoder_sets(expected, inputs(np.random.default_rng(200)))
    for threshold in (False, True):
        cross_layer(expected, threshold)
    expected.write()
    graph(expected.folder)


if __name__ == "__main__":
    main()
