"""Optimizers: AdamW and Muon, the learning rate's schedule, and what they remember as tensors of a checkpoint."""
import math

import torch

from runtime.ranks import gather_tensor, give_form


def cosine(step, steps, warmup=0):
    """Learning-rate factor: linear warm-up, then cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def optimizers(modules, lr, muon, weight_decay, betas=(0.9, 0.98)):
    """AdamW for everything, or, with `muon` (its learning rate) > 0, Muon for the weights of hidden linear layers.

    modules  list of nn.Module; embeddings, convolutions, biases, output layers (names in head, dense) stay with AdamW
    differs: the paper uses AdamW throughout; training from scratch on a CPU, Muon needs about half as many photos.
    """
    hidden = {id(m.weight) for module in modules for name, m in module.named_modules()
              if muon and isinstance(m, torch.nn.Linear) and not name.endswith(("head", "dense"))}
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in params if id(p) in hidden]
    rest = [p for p in params if id(p) not in hidden]
    fused = all(p.is_cuda for p in rest)                                        # needs no copy of the parameters
    chosen = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused or None)]
    if matrices:
        kind = BatchedMuon if matrices[0].is_cuda else torch.optim.Muon
        chosen.append(kind(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    for group in (g for one in chosen for g in one.param_groups):
        group["peak"] = group["lr"]
    return chosen


class BatchedMuon(torch.optim.Muon):
    """torch's Muon for a GPU: matrices of one shape are stepped together, a tenth of the launches; its own bits."""

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step with the gradients that are there; closure is not called."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            by_shape = {}
            for p in params:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                by_shape.setdefault(p.shape, []).append(p)
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for shape, same in by_shape.items():
                grads = [p.grad for p in same]
                buffers = [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
                moves = orthogonalize(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
                scale = 0.2 * math.sqrt(max(shape))                             # match_rms_adamw
                torch._foreach_add_(same, moves.float().unbind(), alpha=-group["lr"] * scale)


def orthogonalize(matrices, coefficients, steps, eps):
    """Singular values of matrices (N, A, B) moved toward 1, in bf16: Newton-Schulz of degree 5 (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def state_tensors(modules, opts, wanted=True):
    """Copies on the CPU of all tensors of a run, by flat name.

    modules  dict name -> nn.Module: "NAME/...";  opts  optimizers: "opt0/..."

    wanted  False: only take part in gathering spread tensors
    """
    flat = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for n, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            flat |= {f"opt{n}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    found = {}
    for k, v in flat.items():
        v = gather_tensor(v.detach())
        if wanted:
            found[k] = torch.empty(v.shape, dtype=v.dtype).copy_(v)
    return found


def load_state_tensors(flat, modules, opts):
    """Inverse of `state_tensors`, in place."""
    for name, module in modules.items():
        module.load_state_dict({k: give_form(flat[f"{name}/{k}"], v) for k, v in module.state_dict().items()})
    for n, opt in enumerate(opts):
        params = [p for group in opt.param_groups for p in group["params"]]
        state = {}
        for key in (k for k in flat if k.startswith(f"opt{n}/")):
            _, index, k = key.split("/")
            state.setdefault(int(index), {})[k] = give_form(flat[key], params[int(index)])
        opt.load_state_dict(dict(opt.state_dict(), state=state))
