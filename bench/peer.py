"""The step of grpo.py as one writes it with diffusers' U-Net, VAE and scheduler: bench/policy.py compares with it."""
import torch

from models.sd2 import LATENT_SCALE

try:
    import diffusers
except ImportError:
    diffusers = None


class Peer:
    """The loop, with the weights of a policy and of its reference (models.marigold.Marigold).

    sd2    configs of unet, vae, scheduler
    cfg    runtime.config.Config
    photo  (1, 3, H, W) uint8
    """

    def __init__(self, policy, ref, sd2, cfg, photo):
        self.cfg = cfg
        self.text = policy.text
        device = policy.text.device
        with torch.device(device):
            self.unet, self.ref = (diffusers.UNet2DConditionModel(**sd2["unet"]) for _ in range(2))
            self.vae = diffusers.AutoencoderKL(**sd2["vae"])
        for net, ours in ((self.unet, policy.unet), (self.ref, ref.unet), (self.vae, policy.vae)):
            net.load_state_dict(ours.state_dict())
        self.ref.requires_grad_(False)
        if cfg.precision != "fp32":                                             # as scripts keep what is frozen
            self.ref.to(torch.bfloat16)
        self.vae.requires_grad_(False)
        self.scheduler = diffusers.DDIMScheduler(**sd2["scheduler"])
        self.scheduler.set_timesteps(self.cfg.sample_steps)
        self.photo = 2 * photo.to(device).float() / 255 - 1

    def amp(self):
        """The mixed precision of training scripts."""
        return torch.autocast(self.photo.device.type, torch.bfloat16, enabled=self.cfg.precision != "fp32")

    def velocity(self, net, cond, x, t):
        """v prediction of all states x (G, c, h, w) at timestep t, behind one photo's latent cond (1, c, h, w)."""
        with self.amp():
            text = self.text.expand(len(x), -1, -1)
            cond = cond.expand(len(x), -1, -1, -1)
            return net(torch.cat((cond, x), 1), t, text).sample.float()

    def gradient(self, x, noise, credit):
        """Rollout and update; the gradient is left in `unet`.

        x        (G, c, h, w)  start
        noise    (G, c, h, w)  a list of them, one for each stochastic step
        credit   (G,)
        returns  (G, 3, H, W)  maps
        """
        eta = self.cfg.noise
        times = self.scheduler.timesteps.tolist()
        transitions = []
        self.unet.zero_grad(set_to_none=True)
        with torch.no_grad():
            with self.amp():
                cond = self.vae.encode(self.photo).latent_dist.mean * LATENT_SCALE
            for k, t in enumerate(times):
                v = self.velocity(self.unet, cond, x, t)
                last = k == len(times) - 1
                x_next = self.scheduler.step(v, t, x, eta=0.0 if last else eta,
                                             variance_noise=None if last else noise[k]).prev_sample
                transitions.append((t, x, x_next))
                x = x_next
            with self.amp():
                maps = torch.cat([self.vae.decode(one / LATENT_SCALE).sample for one in x[:, :4].split(1)])
        for t, x, x_next in transitions[:-1]:
            v = self.velocity(self.unet, cond, x, t)
            with torch.no_grad():
                v_ref = self.velocity(self.ref, cond, x, t)
                before = t - self.scheduler.config.num_train_timesteps // self.cfg.sample_steps
                std = eta * self.scheduler._get_variance(t, before).item() ** 0.5
            mean, mean_ref = (self.scheduler.step(z, t, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
                              for z in (v, v_ref))
            logp = -(x_next - mean).square().flatten(1).mean(1) / (2 * std**2)
            kl = (mean - mean_ref).square().flatten(1).mean(1) / (2 * std**2)
            loss = (self.cfg.kl_weight * kl - (logp - logp.detach()).exp() * credit).mean()
            (loss / len(transitions[:-1])).backward()
        return maps
