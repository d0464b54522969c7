"""Figures of the whole system. So far: the memory of fine-tuning Marigold, computed, not measured.

    python bench.py --part memory        GB for full and LoRA fine-tuning, 512 and 768 px; needs no GPU and no weights

Computed means: the real-size network runs on tensors without data, and the bytes that autograd keeps are counted.
"""
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
import marigold
from config import Parser
from runtime import run_command, write_json

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)                                         # GB of common GPUs
GB = 1e9
SD2 = dict(  # sizes of the public weights
    unet=dict(in_channels=16, out_channels=12, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
              attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, norm_num_groups=32,
              use_linear_projection=True, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    vae=dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, norm_num_groups=32,
             down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4))
JUDGE_PARAMETERS = 3_712_916_480                                                # InternVL2.5-4B at 512 px


def size_of(x):
    """Bytes of a tensor's storage and a name for it."""
    storage = x.untyped_storage()
    return storage._cdata, storage.nbytes()


def activations(unet, px, batch=1):
    """Bytes that autograd keeps of one bf16 forward pass at px x px: (plain, checkpointed).

    checkpointed: the inputs of all layers, what lies outside them, and the dearest layer, which is computed again
    """
    weights = {size_of(p)[0] for p in unet.parameters()}
    kept, layers, inputs, keep_alive = {}, [], {}, []

    def into(target):
        def pack(x):
            key, n = size_of(x)
            if key not in weights:
                target[key] = n
                keep_alive.append(x)                                            # no storage is named twice
            return x
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    plain_layer, norms = marigold.UNet._layer, dict(group_norm=F.group_norm, layer_norm=F.layer_norm)

    def layer(self, resnet, attention, x, emb, context):
        mine = {}
        layers.append(mine)
        inputs.update([size_of(x)])
        keep_alive.append(x)
        with into(mine):
            return plain_layer(self, resnet, attention, x, emb, context)

    marigold.UNet._layer = layer
    for name, norm in norms.items():                                            # autocast on a GPU keeps these in fp32
        setattr(F, name, lambda x, *args, norm=norm: norm(x.float(), *args))
    try:
        with into(kept), torch.autocast("cpu", torch.bfloat16):
            side = px // 8
            unet(torch.empty(batch, unet.config["in_channels"], side, side), 0, torch.empty(1, 2, 1024))
    finally:
        marigold.UNet._layer = plain_layer
        for name, norm in norms.items():
            setattr(F, name, norm)
    plain = dict(kept)
    for mine in layers:
        plain.update(mine)
    return sum(plain.values()), sum((kept | inputs).values()) + max(sum(mine.values()) for mine in layers)


def parameters(module, trained=False):
    """Number of (trained) parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def memory(rank=16):
    """Rows of the memory table, in GB: fp32 weights, AdamW, average, reference, bf16 activations of one state."""
    rows = []
    with FakeTensorMode():
        for px in (512, 768):
            for how in ("full", f"LoRA r {rank}"):
                unet, vae = marigold.UNet(SD2["unet"]), marigold.VAE(SD2["vae"])
                if how != "full":
                    lora.inject(unet, marigold.LORA_TARGETS, rank, rank)
                trained = parameters(unet, trained=True)
                copies = 3 if how == "full" else 1                              # policy, reference, average
                state = 4 * (copies * parameters(unet) + parameters(vae) + trained * (3 if how == "full" else 5))
                decoding = px * px * 256 * 12                                   # bytes, the VAE decoder's widest layer
                for checkpointed, kept in enumerate(activations(unet, px)):
                    kept = max(kept, decoding)
                    total = (state + kept) / GB
                    fits = lambda need: next((c for c in CARDS if need <= 0.92 * c), None)      # noqa: E731
                    judged = total + 2 * JUDGE_PARAMETERS / GB
                    rows.append(dict(px=px, training=how, checkpointing=bool(checkpointed), trained=trained,
                                     state_gb=state / GB, activations_gb=kept / GB, total_gb=total, card_gb=fits(total),
                                     with_judge_gb=judged, with_judge_card_gb=fits(judged)))
    return rows


def main(argv=None):
    """Command line."""
    p = Parser(prog="bench.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--part", choices=("memory",), default="memory", help="what to compute [memory]")
    p.add_argument("--json", default="", help="file for every printed number")
    args = p.parse_args(argv)
    rows = memory()
    print("| px | training | checkpointing | weights, AdamW, average | activations | together | card "
          "| + judge resident | card |\n|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['px']} | {r['training']} | {'yes' if r['checkpointing'] else 'no'} | {r['state_gb']:.1f} | "
              f"{r['activations_gb']:.1f} | {r['total_gb']:.1f} | {r['card_gb']} | {r['with_judge_gb']:.1f} | "
              f"{r['with_judge_card_gb']} |")
    if args.json:
        write_json(args.json, dict(memory=rows))


if __name__ == "__main__":
    run_command(main, "bench.py")
