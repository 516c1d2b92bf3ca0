"""SAELens as the judge of files that it reads from the Hub, here from a folder."""

import json
import struct

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders


def judge(loader, root, repo_id, folder_name, overrides=None, scale=None):
    """The SAE that SAELens makes of the files under `root`; `scale` is folded as it folds the norms
    of its list of releases."""

    def local(*args, **kwargs):
        names = dict(zip(("repo_id", "filename"), args, strict=False)) | kwargs
        path = root / kwargs.get("subfolder", "") / names["filename"]
        if not path.exists():
            raise loaders.EntryNotFoundError(f"no {path}")
        return str(path)

    def shapes(_, filename):
        data = (root / filename).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        return {name: entry["shape"] for name, entry in header.items() if name[:2] != "__"}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    overrides = {"device": "cpu", "dtype": "float32"} | (overrides or {})
    config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](
        repo_id, folder_name, "cpu", False, overrides
    )
    state = {name: array.float() for name, array in state.items()}
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if sae.hook_z_reshaping_mode:  # the heads of our inputs are side by side already
        sae.turn_off_forward_pass_hook_z_reshaping()
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


def codes(sae, x):
    """`(z, y)` of an SAE or transcoder of SAELens."""
    with torch.no_grad():
        x = torch.tensor(x)
        return sae.encode(x).numpy(), sae(x).numpy()
