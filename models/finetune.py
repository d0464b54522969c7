"""Fine-tuning a published judge on true answers: adapters on its language model, the loss on a whole sentence.

Source: the judge release's recipe (LoRA on the seven linear layers, next-token cross-entropy on the answer).
"""
import itertools

import torch
import torch.nn.functional as F

from data import questions
from models import lora
from runtime import ranks
from runtime.ahead import work_ahead
from runtime.config import MICRO
from runtime.ranks import generator

RANK, ALPHA, DROPOUT = 16, 32.0, 0.05                             # of the adapters
WARMUP = 0.03                     # share of the steps with a rising learning rate
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the language model


def add_lora(judge, rng, r=RANK, alpha=ALPHA, dropout=DROPOUT, checkpointing=False):
    """Freeze a judge.Judge and add adapters to the linear layers of its language model; returns their paths in it.

    checkpointing  True: recompute activations in the backward pass (while training)
    raises         ValueError: a judge that is no vision-language model
    """
    if not hasattr(judge, "prompt"):
        raise ValueError(f"finetune: got a {type(judge).__name__} as the judge to tune; want a vision-language model")
    judge.model.requires_grad_(False)
    judge.origin = ""                                                           # weights now differ from the files
    text = judge.model.model.language_model
    if checkpointing:
        getattr(text, "activation_checkpointing_enable", text.gradient_checkpointing_enable)(dict(use_reentrant=False))
    return lora.inject(text, (*LORA_TARGETS, *judge.family.linears), r, alpha, dropout, rng)


def sentence_loss(judge, images, modalities, first):
    """Next-token cross-entropy on the whole answer sentence and its end mark, as in the judge release.

    images (N, 3, S, S) marked; modalities N names; first N bools, True: the first answer is right
    returns  sum over answer tokens (scalar), number of answer tokens
    """
    prompt = judge.prompt
    answers = [prompt.sentences[m][0 if f else 1] for m, f in zip(modalities, first, strict=True)]
    tails = [[*prompt.blocks[m], *answer[len(prompt.blocks[m]) - len(prompt.asked[m]):]]
             for m, answer in zip(modalities, answers, strict=True)]
    ids, position, mask = prompt.pad(tails, images.device)
    with torch.set_grad_enabled(any(p.requires_grad for p in judge.family.vision_tower(judge.model).parameters())):
        features = judge.vision(images)
    hidden = judge.family.hidden_states(judge.model, features, ids, position, mask)[:, :-1]
    taught = torch.zeros_like(mask)
    for i, answer in enumerate(answers):
        taught[i, -len(answer):] = True
    logits = judge.model.lm_head(hidden[taught[:, 1:]])                         # (answer tokens, vocab)
    return F.cross_entropy(logits.float(), ids[taught], reduction="sum"), int(taught.sum())


def tuning_batches(rows, steps, size, cfg):
    """Rows and marked photos of each step, the photos read ahead in threads.

    rows    all training questions, of data.questions;  steps  numbers;  size  px, judge.size
    cfg     judge_batch, micro, scenes, seed of runtime.config.Config
    yields  the batch, list of rows; this rank's micro-batches of it, list of (number, rows, photos (N, 3, S, S))
    """
    micro = cfg.micro or MICRO
    own = range(ranks.rank(), cfg.judge_batch // micro, ranks.world())
    batches = (questions.batch_of(rows, step, cfg.judge_batch, cfg.seed) for step in steps)
    parts = ((batch, k, batch[k * micro:(k + 1) * micro]) for batch in batches for k in own)

    def read(part):
        return *part, questions.marked_photos(part[-1], cfg.scenes, size)

    ready = work_ahead(read, parts, depth=2 * len(own))
    for _ in steps:
        found = list(itertools.islice(ready, len(own)))
        yield found[0][0], [part for _, *part in found]


def tuning_gradient(judge, batch, parts, step, cfg, device, run):
    """Accumulate the gradient of one LoRA step on a judge over micro-batches; returns the loss.

    batch, parts  of `tuning_batches`;  run  runtime.run.Run;  cfg  seed, precision of runtime.config.Config
    Dropout of a micro-batch is seeded by its step and number, so any number of processes takes the same steps.
    """
    tokens = sum(len(judge.prompt.sentences[r["modality"]][not r["first"]]) for r in batch)
    run.where = [r["id"] for _, part, _ in parts for r in part]
    losses = []
    for k, part, images in parts:
        images = images.to(device)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator(cfg.seed, step, k))))
            with ranks.autocast(cfg.precision, device):
                total, n = sentence_loss(judge, images, [r["modality"] for r in part], [r["first"] for r in part])
            run.backward(total * (ranks.world() / tokens))                      # `update` averages over the ranks
        losses.append(total.detach() / n)
    return sum(losses) / len(losses)
