"""A tiny random LLaVA that `transformers serve` opens on a CPU, with the chat marks of Qwen-VL."""
import torch
from chat import write_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SIDE = 56                         # px of its picture
PATCH = 14
IMAGE = "<|image_pad|>"


def write_llava(folder):
    """Write model, tokenizer and processor; returns the model, all of whose weights are random."""
    vocab = write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                              image_size=SIDE, patch_size=PATCH, projection_dim=32)
    text = Qwen2Config(vocab_size=vocab + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1,
                         image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=(SIDE // PATCH)**2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    shape = dict(height=SIDE, width=SIDE)
    pixels = CLIPImageProcessor(size=shape, crop_size=shape, do_center_crop=False)
    LlavaProcessor(pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token=IMAGE,
                   num_additional_image_tokens=1, chat_template="{{ messages }}").save_pretrained(folder)
    return model
