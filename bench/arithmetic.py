"""What the published networks cost, counted on tensors without data: operations, and the memory of fine-tuning.

The real-size network runs, and the bytes that autograd keeps are counted. `python -m bench.system --part memory`
prints the table.
"""
import functools
import itertools

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import lora
from models.copies import multiplying_layers
from models.latent_flow import LORA_TARGETS
from models.sd2 import VAE, UNet

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)                                         # GB of common GPUs
GB = 1e9
BANDWIDTH = 2.8e9                 # bytes that an H100 moves in a millisecond
CACHE = 5.5e9                     # bytes that its L2 cache delivers in a millisecond
LAUNCH = 0.0025                   # ms of one kernel launch
RANK = 16                                                                       # of the adapters in the memory table
SD2 = dict(  # sizes of the public weights
    unet=dict(in_channels=16, out_channels=12, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
              attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, norm_num_groups=32,
              use_linear_projection=True, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    vae=dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, norm_num_groups=32,
             down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
    scheduler=dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                   timestep_spacing="trailing", rescale_betas_zero_snr=True, set_alpha_to_one=False,
                   clip_sample=False, num_train_timesteps=1000, steps_offset=1),
    index=dict(_class_name="MarigoldIntrinsicsPipeline", default_processing_resolution=768, target_properties=dict(
        target_names=["albedo", "shading", "residual"], **{k: dict(prediction_space="linear") for k in (
            "albedo", "shading", "residual")})))
JUDGE = dict(  # config.json of InternVL2.5-4B at the tile of the released judge
    ps_version="v2", downsample_ratio=0.5, force_image_size=512, select_layer=-1,
    vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                       patch_size=14, image_size=448, qkv_bias=True, qk_normalization=False, hidden_act="gelu",
                       layer_norm_eps=1e-6, norm_type="layer_norm", initializer_factor=0.1),
    llm_config=dict(architectures=["Qwen2ForCausalLM"], hidden_size=2048, intermediate_size=11008,
                    num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151674,
                    rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768))
JUDGE_PARAMETERS = 3_712_916_480                                                # InternVL2.5-4B at 512 px


def count_flops(call):
    """Floating-point operations of a call (2 per multiplication and addition of products).

    Attention is taken apart into its products: the counter does not know the CPU's fused form.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def storage_of(x):
    """A tensor's storage: (a key that names it, its bytes)."""
    storage = x.untyped_storage()
    return storage._cdata, storage.nbytes()


def activations(unet, px, batch=1):
    """Bytes that autograd keeps of one bf16 forward pass at px x px: (plain, checkpointed).

    checkpointed: the inputs of all layers, what lies outside them, and the dearest layer, which is computed again
    """
    weights = {storage_of(p)[0] for p in unet.parameters()}
    kept = {}                                                                   # key -> bytes, outside of layers
    layers = []                                                                 # the same of each layer
    inputs = {}                                                                 # the same of the inputs of all layers
    keep_alive = []                                                             # so that no key is given twice

    def record_in(target):
        def record(x):
            key, n = storage_of(x)
            if key not in weights:
                target[key] = n
                keep_alive.append(x)
            return x
        return torch.autograd.graph.saved_tensors_hooks(record, lambda x: x)

    plain_layer = UNet._layer
    norms = dict(group_norm=F.group_norm, layer_norm=F.layer_norm)

    def layer(self, resnet, attention, x, emb, context):
        mine = {}
        layers.append(mine)
        inputs.update([storage_of(x)])
        keep_alive.append(x)
        with record_in(mine):
            return plain_layer(self, resnet, attention, x, emb, context)

    UNet._layer = layer
    for name, norm in norms.items():                                            # autocast on a GPU keeps these in fp32
        setattr(F, name, lambda x, *args, norm=norm: norm(x.float(), *args))
    try:
        with record_in(kept), torch.autocast("cpu", torch.bfloat16):
            side = px // 8
            unet(torch.empty(batch, unet.config["in_channels"], side, side), 0, torch.empty(1, 2, 1024))
    finally:
        UNet._layer = plain_layer
        for name, norm in norms.items():
            setattr(F, name, norm)
    plain = dict(kept)
    for mine in layers:
        plain.update(mine)
    return sum(plain.values()), sum((kept | inputs).values()) + max(sum(mine.values()) for mine in layers)


def count_parameters(module, trained=False):
    """Number of (trained) parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def smallest_card(need):
    """GB of the smallest common GPU that holds `need` GB in 92 % of its memory; None: no card does."""
    return next((c for c in CARDS if need <= 0.92 * c), None)


def state_bytes(unet, vae, full):
    """Bytes of weights, AdamW, average and bf16 reference. full: all weights are trained; else LoRA's, on bf16 weights.

    The copy that a run goes back to when a figure drifts lies in the host's memory, as does a checkpoint in writing
    """
    trained = count_parameters(unet, trained=True)
    halved = sum(p.numel() for m in multiplying_layers(unet) for p in m.parameters())
    of_unet = (12 if full else 4) * count_parameters(unet) - 2 * halved
    return of_unet + 4 * (count_parameters(vae) + trained * (3 if full else 5))


@functools.cache
def memory_table():
    """Rows of the memory table, in GB: fp32 weights, AdamW, average, bf16 reference and activations of one state."""
    rows = []
    with FakeTensorMode():
        for px, how in itertools.product((512, 768), ("full", f"LoRA r {RANK}")):
            unet = UNet(SD2["unet"])
            vae = VAE(SD2["vae"])
            if how != "full":
                lora.inject(unet, LORA_TARGETS, RANK, RANK)
                for m in multiplying_layers(unet):                              # as models.copies.keep_in_bf16
                    for name, p in list(m.named_parameters(recurse=False)):
                        setattr(m, name, torch.nn.Parameter(p.to(torch.bfloat16), requires_grad=False))
            state = state_bytes(unet, vae, how == "full")
            decoding = px * px * 256 * 12                                       # bytes, the VAE decoder's widest layer
            for checkpointed, kept in enumerate(activations(unet, px)):
                kept = max(kept, decoding)
                total = (state + kept) / GB
                with_judge = total + 2 * JUDGE_PARAMETERS / GB
                rows.append(dict(
                    px=px, training=how, checkpointing=bool(checkpointed), trained=count_parameters(unet, trained=True),
                    state_gb=state / GB, activations_gb=kept / GB, total_gb=total, card_gb=smallest_card(total),
                    with_judge_gb=with_judge, with_judge_card_gb=smallest_card(with_judge), peak_gb=None))
    return rows


def predict_ms(count, launches, cached=0):
    """Milliseconds on an H100 of so many bytes of memory, kernel launches and bytes of the cache: the slowest."""
    return max(count / BANDWIDTH, launches * LAUNCH, cached / CACHE)


class Traffic(TorchDispatchMode):
    """Counts what eager torch launches and moves, on tensors without data; a view costs nothing."""

    ms = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and add its time: all it reads and writes, or a launch if that takes longer."""
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            moved = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if func is torch.ops.aten.index_select.default:                     # a 32-byte sector for each element
                moved = moved[1:]
                self.ms += 32 * out.numel() / BANDWIDTH
            self.ms += max(sum(x.nbytes for x in moved) / BANDWIDTH, LAUNCH)
        return out


def predict_eager(call):
    """Milliseconds on an H100 of a call on meta tensors, operator by operator."""
    with Traffic() as traffic:
        call()
    return traffic.ms
