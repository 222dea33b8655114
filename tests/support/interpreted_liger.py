"""Liger's kernels on a CPU: triton interprets them, with TRITON_INTERPRET=1 in the environment.

`python -m interpreted_liger KIND DTYPE FILE` does what `compare` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def compare(kind: str, dtype: str, file: str) -> None:
    """Write to ``file`` how far final states and gradients of a tiny model with Liger's kernels are from its own,
    relative to their norms, and what was left of the kernels afterwards."""
    import torch
    from tiny import tiny_model

    from shoal.models.anatomy import decoder_body, decoder_layers
    from shoal.train.engine.kernels import Fused, require_liger

    _let_triton_interpret_liger()
    model = tiny_model(kind, dtype=getattr(torch, dtype)).train()
    require_liger(model.config.model_type, torch.device("cpu"))
    module = sys.modules[type(model).__module__]
    names, shared = list(model.state_dict()), dict(vars(module))
    ids = torch.arange(24).reshape(2, 12)

    def computed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        states = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state
        states.float().pow(3).sum().backward()
        return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    own_states, own = computed()
    fused = Fused([model])
    fused.install()
    replaced = sum("forward" in vars(part) for part in decoder_layers(model)[0].modules())
    states, gradients = computed()
    fused.uninstall()
    again, _ = computed()
    worst = max(float((gradients[name] - own[name]).norm() / own[name].norm().clamp_min(1e-6)) for name in own)
    story = {
        "states": float((states - own_states).norm() / own_states.norm()),
        "gradients": worst,
        "same_parameters": gradients.keys() == own.keys(),
        "replaced": replaced,
        "undone": bool(torch.equal(again, own_states)) and dict(vars(module)) == shared,
        "same_names": list(model.state_dict()) == names,
    }
    Path(file).write_text(json.dumps(story))


def _let_triton_interpret_liger() -> None:
    """triton's interpreter takes neither plain floats as arguments nor functions of CUDA's own library."""
    import liger_kernel.ops.geglu as gated  # pyright: ignore[reportMissingImports]
    import liger_kernel.ops.rms_norm as norm  # pyright: ignore[reportMissingImports]
    import numpy as np
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if type(argument) is float:
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = converted
    norm.rsqrt = lambda value: 1 / tl.sqrt(value)
    gated.tanh = lambda value: 2 / (1 + tl.exp(-2 * value)) - 1


if __name__ == "__main__":
    compare(*sys.argv[1:])
